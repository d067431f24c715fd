"""Logs: events with fields on stderr, as JSON lines or as text for people.

Ours are written with structlog; what the libraries log through `logging` (grpc, opentelemetry, uvicorn, asyncio) and
Python's warnings take the same way out. Nothing is logged on the request path.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, TypeVar

import structlog
from structlog.typing import Processor

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
"""LOG_FORMAT, in any case; the default is text, as in envoyproxy/ratelimit, whose text is called logfmt by some."""


def configure_logs(environ: Mapping[str, str], handler: logging.Handler, *, colors: bool = False) -> None:
    """Send every log of the process one way, as LOG_LEVEL (default info) and LOG_FORMAT (default text) say.

    Args:
        handler: takes the lines; `LogWriter` does so without blocking.
        colors: of the text for people.

    Raises:
        ValueError: a variable has a value it cannot have; the text names it and the values it can have.
    """
    format_ = _choice(environ, "LOG_FORMAT", FORMATS, "text")
    handler.setFormatter(_formatter(format_, colors=colors))
    # The level comes last, so that a wrong one can be told in the format that was asked for.
    logging.basicConfig(handlers=[handler], level=LEVELS["info"], force=True)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_annotations(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    logging.getLogger().setLevel(_choice(environ, "LOG_LEVEL", LEVELS, "info"))


def is_json(environ: Mapping[str, str]) -> bool:
    """Whether whoever reads the log expects JSON lines."""
    return FORMATS.get(environ.get("LOG_FORMAT", "").lower()) == "json"


def _annotations() -> list[Processor]:
    return [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _formatter(format_: LogFormat, colors: bool) -> logging.Formatter:
    renderers: list[Processor]
    if format_ == "json":
        # The traceback as one string: the structured form would carry local variables, and with them secrets.
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        renderers = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_annotations(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )


_Value = TypeVar("_Value")


def _choice(environ: Mapping[str, str], name: str, choices: Mapping[str, _Value], default: str) -> _Value:
    given = environ.get(name) or default
    if given.lower() not in choices:
        raise ValueError(f"{name} is {given!r}, expected one of {', '.join(choices)}")
    return choices[given.lower()]
