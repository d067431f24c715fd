"""Writes log lines in a thread of its own, so that a log which nobody reads, or a full disk, holds up nothing else.

Lines wait in a queue of at most `MAX_WAITING_BYTES`. Those that find it full are dropped and counted, as are those that
cannot be written.
"""

from __future__ import annotations

import logging
import os
import stat
from queue import SimpleQueue
from threading import Event, Lock, Thread

MAX_WAITING_BYTES = 4 * 1_024 * 1_024
"""Some 20,000 lines: more than a busy sidecar says in an hour."""

FLUSH_SECONDS = 2.0
"""What the log's reader gets to take what waits, at the end of the process."""


STDERR = 2


def take_stderr() -> int:
    """A descriptor for the log. What libraries write to stderr by themselves, as gRPC's C core does, never blocks from
    now on: where stderr is a pipe that nobody reads, that is lost.

    A pipe is opened anew for them, since to set the one that was given would set it for whoever else has it.
    """
    try:
        if not stat.S_ISFIFO(os.fstat(STDERR).st_mode):
            return STDERR
        opened = os.open(f"/proc/self/fd/{STDERR}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return STDERR
    log = os.dup(STDERR)
    os.dup2(opened, STDERR)
    os.close(opened)
    return log


class LogWriter(logging.Handler):
    """A handler whose `emit` never blocks.

    Args:
        descriptor: of the file that is written to.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.dropped_lines = 0
        self._descriptor = descriptor
        self._waiting: SimpleQueue[bytes | Event] = SimpleQueue()
        self._counting = Lock()
        self._waiting_bytes = 0
        Thread(target=self._write_forever, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            line = f"a log line of {record.name} cannot be rendered: {error!r}"
        self.write_line(line)

    def write_line(self, line: str) -> None:
        """Write a line as it is."""
        raw = f"{line}\n".encode("utf-8", "backslashreplace")
        with self._counting:
            if self._waiting_bytes + len(raw) > MAX_WAITING_BYTES:
                self.dropped_lines += 1
                return
            self._waiting_bytes += len(raw)
        self._waiting.put(raw)

    def flush(self) -> None:
        """Wait until what was said so far is written, though for `FLUSH_SECONDS` at most."""
        written = Event()
        self._waiting.put(written)
        written.wait(FLUSH_SECONDS)

    def _write_forever(self) -> None:
        while True:
            waiting = self._waiting.get()
            if isinstance(waiting, Event):
                waiting.set()
                continue
            is_written = _write(self._descriptor, waiting)
            with self._counting:
                self._waiting_bytes -= len(waiting)
                self.dropped_lines += not is_written


def _write(descriptor: int, raw: bytes) -> bool:
    """Whether all of it could be written."""
    try:
        while raw:
            raw = raw[os.write(descriptor, raw) :]
    except OSError:
        # The disk is full, or whoever has read the log is gone: the next line may find it otherwise.
        return False
    return True
