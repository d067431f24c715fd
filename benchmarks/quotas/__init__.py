"""A simulator of quotas: Envoys that enforce shares of one limit and report every five seconds, on virtual time.

The sidecar's own code divides the limit as it does in production; beside it Doorman's way, an Envoy each with the whole
limit, and one bucket that is asked for each request. Demand jumps, and what is admitted is measured until it is fair
again. The same seed gives the same tables.
"""
