"""Generated from proto/ratelimit_sidecar/limiter/v1 by `python proto/generate.py`; never edited."""
