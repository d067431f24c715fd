"""Logs: events with fields on stderr, as JSON lines or as text for people.

Our events are logged with structlog. Logs of libraries (grpc, opentelemetry, uvicorn, asyncio), Python's warnings and
uncaught exceptions go the same way. Nothing is logged on the request path. Lines that repeat very often are left out
and counted (`Repeats`).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}
"""LOG_LEVEL, in any case: the spellings of envoyproxy/ratelimit."""

LogFormat = Literal["text", "json"]

FORMATS: Mapping[str, LogFormat] = {"text": "text", "logfmt": "text", "json": "json"}
"""LOG_FORMAT, in any case. The default is text, as in envoyproxy/ratelimit; its text format is also called logfmt."""

BURST_LINES: Final = 50
REFILL_SECONDS: Final = 30.0
"""The lines from one place in the code that pass at once, and the time after which one more passes: 3,000 a day."""


def configure_logs(environ: Mapping[str, str], handler: logging.Handler, *, colors: bool = False) -> None:
    """Send all logs of the process to one handler, with LOG_LEVEL (default info) and LOG_FORMAT (default text).

    Args:
        handler: writes the lines; `LogWriter` does so without blocking.
        colors: True for colored text.

    Raises:
        ValueError: a variable has an unknown value; the text names it and the known values.
    """
    # Wrong values are reported at the end, so that the error is logged in the requested format.
    format_ = FORMATS.get(environ.get("LOG_FORMAT", "").lower(), "text")
    handler.setFormatter(_formatter(format_, colors=colors))
    handler.addFilter(Repeats())
    logging.basicConfig(handlers=[handler], level=LEVELS["info"], force=True)
    # It logs every header of every request.
    logging.getLogger("hpack").setLevel(logging.INFO)
    logging.captureWarnings(True)
    _log_uncaught()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_annotations(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    _choice(environ, "LOG_FORMAT", FORMATS, "text")
    logging.getLogger().setLevel(_choice(environ, "LOG_LEVEL", LEVELS, "info"))


class LogLevel:
    """The current log level, which may differ from the configured one for a while. Make it once logging is
    configured.
    """

    def __init__(self) -> None:
        self._root = logging.getLogger()
        self.configured = self._root.level
        self._back: asyncio.TimerHandle | None = None

    @property
    def current(self) -> int:
        return self._root.level

    def set(self, level: int, seconds: float | None = None) -> None:
        """Change the level.

        Args:
            seconds: after this time the configured level returns; None to keep the new one.
        """
        if self._back is not None:
            self._back.cancel()
        self._back = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._go_back)
        self._root.setLevel(level)

    def _go_back(self) -> None:
        self._back = None
        self._root.setLevel(self.configured)
        structlog.stdlib.get_logger(__name__).warning("log_level_restored", to=level_name(self.configured))


def level_name(level: int) -> str:
    names = {LEVELS[name]: name for name in ("debug", "info", "warning", "error", "fatal")}
    return names.get(level, str(level))


@dataclass(slots=True)
class _Place:
    left: float
    at_s: float
    left_out: int = 0


class Repeats(logging.Filter):
    """Leaves out lines from a place in the code that logs too often. The next line that passes says how many were left
    out (`left_out`). Lines with `audit=True` and critical ones always pass.

    Args:
        monotonic_s: returns the seconds of a clock that never steps.
    """

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        # Bounded by the code: events are literals.
        self._places: dict[tuple[str, int, str], _Place] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        fields = record.msg if isinstance(record.msg, dict) else {}
        if record.levelno >= logging.CRITICAL or fields.get("audit"):
            return True
        now_s = self._monotonic_s()
        with self._lock:
            key = (record.pathname, record.lineno, str(fields.get("event", "")))
            place = self._places.setdefault(key, _Place(BURST_LINES, now_s))
            place.left = min(BURST_LINES, place.left + (now_s - place.at_s) / REFILL_SECONDS)
            place.at_s = now_s
            if place.left < 1:
                place.left_out += 1
                return False
            place.left -= 1
            record.left_out, place.left_out = place.left_out, 0
        return True


def _log_uncaught() -> None:
    """Log exceptions that Python would print on stderr."""
    log = structlog.stdlib.get_logger(__name__)

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
            name = None if failed.thread is None else failed.thread.name
            log.error("thread_failed", thread=name, exc_info=failed.exc_value)

    def unraisable(failed: sys.UnraisableHookArgs) -> None:
        log.error("exception_ignored", where=failed.err_msg, what=repr(failed.object), exc_info=failed.exc_value)

    threading.excepthook = of_thread
    sys.unraisablehook = unraisable


def _annotations() -> list[Processor]:
    return [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _formatter(format_: LogFormat, colors: bool) -> logging.Formatter:
    renderers: list[Processor]
    if format_ == "json":
        # The traceback as one string: the structured form contains local variables, and so secrets.
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        renderers = [
            _put_below,
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback),
        ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_annotations(),
        processors=[_tell_left_out, structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )


def _put_below(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Write a reason of several lines below the event, like a traceback."""
    why = event.get("why")
    if isinstance(why, str) and "\n" in why and "exception" not in event:
        event["exception"] = event.pop("why")
    return event


def _tell_left_out(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    left_out = getattr(event["_record"], "left_out", 0)
    return {**event, "left_out": left_out} if left_out else event


_Value = TypeVar("_Value")


def _choice(environ: Mapping[str, str], name: str, choices: Mapping[str, _Value], default: str) -> _Value:
    given = environ.get(name) or default
    if given.lower() not in choices:
        raise ValueError(f"{name} is {given!r}, expected one of {', '.join(choices)}")
    return choices[given.lower()]
