"""What the system is asked for names, and what becomes of it when the system doesn't answer."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from replication.meshes import TIMEOUT_SECONDS

from ratelimit_sidecar.replication.resolver import system_addresses


async def test_the_system_resolves_the_machines_own_name() -> None:
    assert {"127.0.0.1", "::1"} & set(await system_addresses("localhost", 1))


async def test_a_name_that_is_nobodys_or_nobodys_can_be_is_an_error() -> None:
    with pytest.raises(OSError, match=r"not known|No address|Temporary failure"):
        await system_addresses("nowhere.invalid", 1)
    with pytest.raises(UnicodeError):
        await system_addresses("x" * 64, 1)


def test_a_system_that_does_not_answer_holds_up_neither_the_loops_end_nor_the_processs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, may_answer = threading.Event(), threading.Event()
    answered_in_time: list[bool] = []

    def hang(*_: object, **__: object) -> list[object]:
        asked.set()
        answered_in_time.append(may_answer.wait(TIMEOUT_SECONDS))
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)

    async def ask_and_give_up() -> None:
        asking = asyncio.create_task(system_addresses("mesh.example", 1))
        # Not in one of the loop's own threads, which a loop waits for.
        while not asked.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asking.cancel()

    asyncio.run(ask_and_give_up())
    [thread] = [thread for thread in threading.enumerate() if thread.name == "resolve mesh.example"]
    assert thread.daemon
    may_answer.set()
    thread.join()
    assert answered_in_time == [True]
