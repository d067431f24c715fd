"""What is noted of the callbacks of an event loop, and a sidecar that notes it."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.callbacks import print_table
from benchmarks.serving.generator import Generator, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.requests import RULES
from benchmarks.serving.servers import running_servers
from benchmarks.serving.timed_sidecar import CallbackTimes, Timed, name_of, timed_sidecar

MS = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def work(self, milliseconds: float) -> None:
        self.now_ns += int(milliseconds * MS)


def test_callbacks_are_told_apart_by_name_and_those_that_took_most_come_first() -> None:
    clock = Clock()
    times = CallbackTimes(clock)
    for milliseconds in (0.1, 0.2, 1.0, 3.0):
        times.run(partial(clock.work, milliseconds), "one")
    times.run(partial(clock.work, 5), "other")
    assert times.noted() == [
        Timed("other", calls=1, total=5.0, p50=5.0, p99=5.0, longest=5.0, long=1),
        Timed("one", calls=4, total=4.3, p50=1.0, p99=3.0, longest=3.0, long=1),
    ]
    times.forget()
    assert times.noted() == []


def test_a_garbage_collection_is_no_part_of_the_callback_that_it_fell_into() -> None:
    clock = Clock()
    times = CallbackTimes(clock)

    def collect() -> None:
        clock.work(1)
        times.note_collection("start", {"generation": 1})
        clock.work(7)
        times.note_collection("stop", {"generation": 1})
        clock.work(1)

    times.run(collect, "callback")
    times.run(partial(clock.work, 1), "callback")
    assert {each.name: (each.calls, each.total) for each in times.noted()} == {
        "garbage collection, middle": (1, 7.0),
        "callback": (2, 3.0),
    }


def test_a_callback_has_the_name_of_the_code_that_it_runs() -> None:
    assert name_of(Clock().work) == "Clock.work"
    assert name_of(partial(Clock.work, Clock(), 1)) == "Clock.work"
    assert name_of(Clock()) == "Clock"


READ = "_SelectorSocketTransport._read_ready"


@pytest.mark.slow
def test_a_sidecar_notes_what_its_loop_does_from_the_beginning_on(capsys: pytest.CaptureFixture[str]) -> None:
    with running_servers() as servers:
        sidecar = timed_sidecar(servers, rules=RULES)
        with Generator(sidecar.server.address, Load(1, 100)) as generator:
            generator.run(uniform(100), 0.5, 500)
            sidecar.begin()
            generator.run(uniform(100), 0.5, 500)
        timed = sidecar.noted()
    # A read, in which requests are answered at once, and often brings one of them.
    calls = next(each.calls for each in timed if each.name == READ)
    assert 25 <= calls <= 260
    assert not any(" at 0x" in each.name for each in timed)
    print_table(timed)
    assert READ in capsys.readouterr().out
