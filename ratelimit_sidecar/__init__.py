"""A global rate limiter for Envoy that answers from memory and replicates between regions."""

__version__ = "0.1.0"
