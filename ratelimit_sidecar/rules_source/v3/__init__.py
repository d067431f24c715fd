"""Generated from proto/ratelimit_sidecar/rules_source/v3 by `python proto/generate.py`; never edited."""
