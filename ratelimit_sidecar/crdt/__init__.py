"""Replicated token buckets: pure, without I/O, clock or asyncio. Imports nothing of the other layers."""
