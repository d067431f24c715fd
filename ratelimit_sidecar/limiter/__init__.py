"""From a request to its plan and to decisions: pure, without I/O, clock or asyncio. The one place where limits are
decided."""
