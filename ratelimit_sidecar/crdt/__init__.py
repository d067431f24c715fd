"""Buckets (token buckets, windows, strict buckets) and their stores: pure, without I/O, clock or asyncio.

Strict buckets are here since a purse is a bounded counter, a CRDT whose tokens move between replicas (Balegas et al.,
"Extending Eventually Consistent Cloud Databases for Enforcing Numeric Invariants", 2015).

Of the other layers it imports only `cycle_collector`.
"""
