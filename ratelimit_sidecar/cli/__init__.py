"""The `ratelimit-sidecar` command: one module a subcommand; parses, prints, calls, nothing else."""

from __future__ import annotations

import click

from ratelimit_sidecar import __version__
from ratelimit_sidecar.cli.check import check
from ratelimit_sidecar.cli.demo import demo
from ratelimit_sidecar.cli.explain import explain
from ratelimit_sidecar.cli.log_level import log_level
from ratelimit_sidecar.cli.peers import peers
from ratelimit_sidecar.cli.refund import grant, reset
from ratelimit_sidecar.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, package_name="ratelimit-sidecar")
def main() -> None:
    """A rate limiter for Envoy and Istio that answers from memory and shares its limits between regions."""


main.add_command(serve)
main.add_command(check)
main.add_command(demo)
main.add_command(explain)
main.add_command(peers)
main.add_command(reset)
main.add_command(grant)
main.add_command(log_level)
