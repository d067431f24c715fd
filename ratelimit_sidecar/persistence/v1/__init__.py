"""Generated from proto/ratelimit_sidecar/persistence/v1 by `python proto/generate.py`; never edited."""
