"""Buckets (token buckets, windows, strict buckets) and their stores: pure, without I/O, clock or asyncio.

Imports nothing of the other layers.
"""
