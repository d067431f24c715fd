"""From a request to plan to decisions: pure, without I/O, clock or asyncio. The one place where limits are decided."""
