"""Envoy's APIs, one module an API: the raw message of a call in, the raw answer out."""
