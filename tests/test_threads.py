"""Blocking work in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from ratelimit_sidecar.threads import in_daemon_thread


async def test_it_gives_what_the_work_returns_or_raises() -> None:
    assert await in_daemon_thread("work", lambda: threading.current_thread().name) == "work"
    with pytest.raises(LookupError, match="unknown encoding"):
        await in_daemon_thread("work", lambda: b"x".decode("no such encoding"))


async def test_cancelled_it_does_not_wait_for_the_work() -> None:
    answers = threading.Event()
    working = asyncio.create_task(in_daemon_thread("work", answers.wait))
    await asyncio.sleep(0)
    working.cancel()
    async with asyncio.timeout(30):
        await asyncio.wait([working])
    answers.set()


def test_a_process_ends_though_the_work_does_not() -> None:
    program = """if True:
        import asyncio, threading
        from ratelimit_sidecar.threads import in_daemon_thread
        async def main():
            asyncio.ensure_future(in_daemon_thread("work", threading.Event().wait))
            await asyncio.sleep(0)
        asyncio.run(main())
    """
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)
