"""Writes log lines in a thread, so that a log that nobody reads, or a full disk, delays nothing else.

Lines wait in a queue of at most `MAX_WAITING_BYTES`. Lines that do not fit, or cannot be written, are dropped and
counted.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Final

import structlog

MAX_WAITING_BYTES: Final = 4 * 1_024 * 1_024
"""About 20,000 lines: more than a busy sidecar logs in an hour."""

FLUSH_SECONDS: Final = 2.0
"""How long the process waits at its end for the log to be written."""


STDERR = 2


MAX_LINE_BYTES = 16_384
"""A line of stderr is cut at this length."""

_ABSL = re.compile(rb"([IWEF])\d{4} ")
_ABSL_LEVELS = {b"I": logging.INFO, b"W": logging.WARNING, b"E": logging.ERROR, b"F": logging.ERROR}
"""Prefixes of lines of gRPC's core: level, month and day."""

_log = structlog.stdlib.get_logger(__name__)


class TakenStderr:
    """Redirects stderr to the log. Libraries, as gRPC's C core, write to stderr through a pipe, and each line is logged
    as an event `stderr`. They are never blocked: text that does not fit into the pipe is lost.

    When the process crashes, text in the pipe is lost, too; the stack trace of the crash is written to the log as it
    is.
    """

    def __init__(self) -> None:
        self.log = os.dup(STDERR)
        """A descriptor of the original stderr."""
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        os.dup2(write, STDERR)
        os.close(write)
        faulthandler.enable(self.log)
        self._reader = Thread(target=self._read_forever, name="stderr", daemon=True)

    def start(self) -> None:
        """Start logging what is written to stderr, earlier text included."""
        self._reader.start()

    def close(self) -> None:
        """Log what was written so far. Later text goes to stderr as it is."""
        os.dup2(self.log, STDERR)
        self._reader.join(FLUSH_SECONDS)

    def _read_forever(self) -> None:
        rest = b""
        while read := os.read(self._read, MAX_LINE_BYTES):
            *lines, rest = (rest + read).split(b"\n")
            if len(rest) >= MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            log_lines(lines)
        log_lines([rest])


def log_lines(lines: Sequence[bytes]) -> None:
    """Log lines of stderr, each with the level that it names."""
    for line in lines:
        if line.strip():
            as_absl = _ABSL.match(line)
            level = logging.WARNING if as_absl is None else _ABSL_LEVELS[as_absl[1]]
            _log.log(level, "stderr", line=line.decode("utf-8", "backslashreplace"))


class LogWriter(logging.Handler):
    """A log handler whose `emit` never blocks.

    Args:
        descriptor: of the file to write to.
        max_waiting_bytes: of lines that wait to be written.
        flush_seconds: how long `flush` waits at most.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        super().__init__()
        self._max_waiting_bytes = max_waiting_bytes
        self._flush_seconds = flush_seconds
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
        raw = f"{line}\n".encode("utf-8", "backslashreplace")
        with self._counting:
            if self._waiting_bytes + len(raw) > self._max_waiting_bytes:
                self.dropped_lines += 1
                return
            self._waiting_bytes += len(raw)
        self._waiting.put(raw)

    def flush(self) -> None:
        """Wait until all lines so far are written, at most for `flush_seconds`."""
        written = Event()
        self._waiting.put(written)
        written.wait(self._flush_seconds)

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
    """Write bytes; returns False if that fails."""
    try:
        while raw:
            raw = raw[os.write(descriptor, raw) :]
    except OSError:
        # The disk is full, or the reader of the log is gone; the next line may succeed.
        return False
    return True
