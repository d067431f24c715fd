"""The log never holds up who logs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ratelimit_sidecar.telemetry.log_writer import LogWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends, full: nobody has read it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(65_536))
    os.set_blocking(write, True)
    yield read, write
    os.close(read)
    os.close(write)


def record(text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 1, text, arguments, None)


def read_lines(descriptor: int, count: int) -> list[bytes]:
    said = b""
    while said.count(b"\n") < count:
        said += os.read(descriptor, 65_536).lstrip(b"\0")
    return said.splitlines()


def test_lines_come_out_in_order() -> None:
    read, write = os.pipe()
    writer = LogWriter(write)
    for number in range(3):
        writer.handle(record("line %d", number))
    writer.flush()
    assert os.read(read, 1_000) == b"line 0\nline 1\nline 2\n"
    assert writer.dropped_lines == 0


def test_a_log_that_nobody_reads_holds_up_nobody_and_what_is_too_much_is_counted(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1], max_waiting_bytes=100)
    for number in range(10):
        writer.handle(record("%s", f"line {number}".ljust(24)))
    assert writer.dropped_lines == 6
    # Since it is read again, it is written again.
    assert [line.split()[1] for line in read_lines(pipe[0], 4)] == [b"0", b"1", b"2", b"3"]
    writer.flush()
    writer.handle(record("and on"))
    assert read_lines(pipe[0], 1) == [b"and on"]


def test_a_flush_ends_though_nobody_reads(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1], flush_seconds=0.01)
    writer.handle(record("lost"))
    writer.flush()


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    writer = LogWriter(os.open("/dev/full", os.O_WRONLY))
    writer.handle(record("lost"))
    writer.flush()
    assert writer.dropped_lines == 1


def test_a_line_that_cannot_be_rendered_says_so() -> None:
    read, write = os.pipe()
    writer = LogWriter(write)
    writer.handle(record("%d", "no number"))
    writer.flush()
    assert os.read(read, 1_000).startswith(b"a log line of test cannot be rendered: TypeError")


def test_libraries_that_write_to_a_full_stderr_are_not_held_up(pipe: tuple[int, int]) -> None:
    program = """if True:
        import os
        from ratelimit_sidecar.telemetry.log_writer import TakenStderr
        # Nobody reads it yet.
        stderr = TakenStderr()
        assert os.get_blocking(stderr.log)
        try:
            for _ in range(1_000):
                os.write(2, bytes(65_536))
        except BlockingIOError:
            print("not held up")
    """
    ran = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=pipe[1], timeout=30, check=True
    )
    assert ran.stdout == b"not held up\n"
    # Who has given it the pipe still has it as it was.
    assert os.get_blocking(pipe[1])
