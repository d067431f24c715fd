"""Generated from proto/ratelimit_sidecar/services/v1 by `python proto/generate.py`; never edited."""
