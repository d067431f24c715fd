"""Work that blocks, done in a thread of its own which never keeps the process from ending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

_Result = TypeVar("_Result")


async def in_daemon_thread(name: str, work: Callable[[], _Result]) -> _Result:
    """What `work` returns, or raises.

    For what may never end, as reading from a network file system that hangs. The loop's own threads (and uvloop's) are
    waited for when the process ends, and there are few of them. Cancelled, this returns at once, and the thread goes on
    by itself.

    Raises:
        RuntimeError: the system has no more threads.
    """
    done: Future[_Result] = Future()
    # From now on it can't be cancelled: the thread ends when its work does, whoever still waits.
    done.set_running_or_notify_cancel()
    Thread(target=_run, args=(work, done), name=name, daemon=True).start()
    try:
        return await asyncio.wrap_future(done)
    finally:
        # An exception in it refers to this frame, by its traceback: a cycle, which nobody collects.
        del done


def _run(work: Callable[[], _Result], done: Future[_Result]) -> None:
    try:
        result = work()
    except BaseException as error:
        # Whatever it is, who waits must hear of it.
        done.set_exception(error)
        # As above.
        del done
    else:
        done.set_result(result)
