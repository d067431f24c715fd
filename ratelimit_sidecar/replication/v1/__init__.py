"""Generated from proto/ratelimit_sidecar/replication/v1 by `python proto/generate.py`; never edited."""
