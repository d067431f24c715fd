"""`python -m ratelimit_sidecar` is the `ratelimit-sidecar` command."""

from ratelimit_sidecar.cli import main

main()
