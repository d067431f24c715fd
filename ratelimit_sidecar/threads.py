"""Blocking work in a daemon thread, which does not keep the process from ending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

_Result = TypeVar("_Result")


async def in_daemon_thread(name: str, work: Callable[[], _Result]) -> _Result:
    """Run blocking `work` in a daemon thread and return its result.

    It is for work that may never end, as reading from a network file system that hangs. The loop's own threads (and
    uvloop's) are few, and the process waits for them when it ends. When this is cancelled it returns at once, and the
    thread goes on.

    Raises:
        RuntimeError: the system has no more threads.
        Exception: what `work` raises.
    """
    done: Future[_Result] = Future()
    # From now on the future cannot be cancelled: the thread always runs to its end.
    done.set_running_or_notify_cancel()
    Thread(target=_run, args=(work, done), name=name, daemon=True).start()
    try:
        return await asyncio.wrap_future(done)
    finally:
        # An exception in it refers to this frame by its traceback: a reference cycle, which is never collected.
        del done


def _run(work: Callable[[], _Result], done: Future[_Result]) -> None:
    try:
        result = work()
    except BaseException as error:
        # The waiting task must get every exception, whatever it is.
        done.set_exception(error)
        # A reference cycle, as above.
        del done
    else:
        done.set_result(result)
