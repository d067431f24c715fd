"""Every log of the process leaves one way: as JSON lines or as text."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import warnings

import pytest
import structlog

from ratelimit_sidecar.telemetry.logs import BURST_LINES, REFILL_SECONDS, LogLevel, Repeats, configure_logs

pytestmark = pytest.mark.usefixtures("logs_as_before")


def configured(**environ: str) -> io.StringIO:
    stream = io.StringIO()
    # basicConfig(force=True) closes what it replaces; pytest's handlers are still wanted.
    logging.getLogger().handlers.clear()
    configure_logs(environ, logging.StreamHandler(stream))
    return stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_line_with_its_fields() -> None:
    stream = configured(LOG_FORMAT="json")
    structlog.stdlib.get_logger("mesh").info("peer_connected", peer="eu-1", attempts=2)
    [line] = lines(stream)
    assert line.pop("timestamp")
    assert line == {"event": "peer_connected", "level": "info", "logger": "mesh", "peer": "eu-1", "attempts": 2}


def test_what_libraries_log_takes_the_same_way() -> None:
    stream = configured(LOG_FORMAT="json")
    logging.getLogger("grpc._server").warning("lost %s", "a stream")
    [line] = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("lost a stream", "warning", "grpc._server")


def test_warnings_of_python_take_the_same_way() -> None:
    stream = configured(LOG_FORMAT="json")
    warnings.simplefilter("always")
    warnings.warn("that will go away", stacklevel=1)
    [line] = lines(stream)
    assert "that will go away" in str(line["event"])


@pytest.mark.parametrize("format_", ["json", "text"])
def test_an_exception_brings_its_traceback_but_no_local_variables(format_: str) -> None:
    stream = configured(LOG_FORMAT=format_)
    secret = "hunter2"
    try:
        raise KeyError(secret[:0])
    except KeyError:
        structlog.stdlib.get_logger().exception("task_died")
        logging.getLogger("asyncio").exception("as a library says it")
    text = stream.getvalue()
    assert text.count("Traceback (most recent call last)") == 2
    assert "test_logs.py" in text
    assert secret not in text


@pytest.mark.parametrize(("given", "format_"), [("JSON", "json"), ("text", "text"), ("logfmt", "text"), ("", "text")])
def test_the_format_in_force_is_returned_for_others_to_follow(given: str, format_: str) -> None:
    logging.getLogger().handlers.clear()
    stream = io.StringIO()
    configure_logs({"LOG_FORMAT": given}, logging.StreamHandler(stream))
    structlog.stdlib.get_logger("test").info("something")
    assert stream.getvalue().startswith("{") == (format_ == "json")


def test_text_is_one_readable_line_without_colours_when_nobody_watches() -> None:
    stream = configured(LOG_FORMAT="text")
    structlog.stdlib.get_logger("mesh").info("peer_connected", peer="eu-1")
    [line] = stream.getvalue().splitlines()
    assert "peer_connected" in line
    assert "peer=eu-1" in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("debug", ["d", "i", "w", "e"]),
        ("INFO", ["i", "w", "e"]),
        ("", ["i", "w", "e"]),
        ("warn", ["w", "e"]),
        ("warning", ["w", "e"]),
        ("Error", ["e"]),
        ("fatal", []),
        ("PANIC", []),
        ("trace", ["d", "i", "w", "e"]),
    ],
)
def test_log_level_holds_for_ours_and_for_libraries(level: str, logged: list[str]) -> None:
    stream = configured(LOG_FORMAT="json", LOG_LEVEL=level)
    for logger in (structlog.stdlib.get_logger("ours"), logging.getLogger("theirs")):
        logger.debug("d")
        logger.info("i")
        logger.warning("w")
        logger.error("e")
    assert [line["event"] for line in lines(stream)] == logged * 2


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LOG_LEVEL", "loud", "trace, debug, info, warn, warning, error, fatal, panic"),
        ("LOG_FORMAT", "xml", "text, logfmt, json"),
    ],
)
def test_an_impossible_setting_is_refused_with_what_is_possible(variable: str, value: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{variable} is '{value}', expected one of {expected}"):
        configured(**{variable: value})


def test_lines_that_repeat_are_left_out_and_counted() -> None:
    now_s = 1_000.0
    stream = configured(LOG_FORMAT="json")
    [handler] = logging.getLogger().handlers
    handler.filters[:] = [Repeats(lambda: now_s)]
    log = structlog.stdlib.get_logger("mesh")

    def say(times: int) -> None:
        for number in range(times):
            log.warning("peer_unreachable", number=number)

    say(BURST_LINES + 7)
    logging.getLogger("grpc").warning("what others say is counted for itself")
    assert len(lines(stream)) == BURST_LINES + 1
    now_s += REFILL_SECONDS
    say(2)
    *_, line = lines(stream)
    assert line["left_out"] == 7
    assert len(lines(stream)) == BURST_LINES + 2
    now_s += BURST_LINES * REFILL_SECONDS
    say(2)
    assert [line.get("left_out") for line in lines(stream)[-2:]] == [1, None]


def test_libraries_repeat_themselves_with_other_words() -> None:
    stream = configured(LOG_FORMAT="json")
    for number in range(2 * BURST_LINES):
        logging.getLogger("grpc").warning(f"peer {number} is gone")
    assert len(lines(stream)) == BURST_LINES


def test_what_an_operator_did_is_never_left_out() -> None:
    stream = configured(LOG_FORMAT="json")
    for number in range(2 * BURST_LINES):
        structlog.stdlib.get_logger("console").warning("refunded", audit=True, number=number)
    assert len(lines(stream)) == 2 * BURST_LINES


async def test_another_level_holds_until_the_configured_one_comes_back() -> None:
    stream = configured(LOG_FORMAT="json", LOG_LEVEL="error")
    level = LogLevel()
    level.set(logging.DEBUG, seconds=3_600)
    structlog.stdlib.get_logger("mesh").debug("seen")
    level.set(logging.INFO, seconds=0)
    async with asyncio.timeout(60):
        while level.current != level.configured:  # noqa: ASYNC110 (a timer of the loop)
            await asyncio.sleep(0)
    structlog.stdlib.get_logger("mesh").info("not seen")
    assert [line["event"] for line in lines(stream)] == ["seen"]


def test_a_reason_of_several_lines_can_be_read_by_people() -> None:
    stream = configured(LOG_FORMAT="text")
    structlog.stdlib.get_logger("serve").critical("failed", why="rules.yaml:3:5: key\n  expected a text")
    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert rest == ["rules.yaml:3:5: key", "  expected a text"]
