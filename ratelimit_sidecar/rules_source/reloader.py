"""The rules in force, and the outcome of the newest attempt to replace them.

Rules are read in a thread, and put in force by the event loop between two requests. So each request is decided by the
old rules or by the new ones. If the new rules cannot be used, the old ones stay, and the reason is kept until an
attempt succeeds. The old rules are freed in a thread, too.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import structlog

from ratelimit_sidecar.config.errors import ConfigError, Problem
from ratelimit_sidecar.config.reclamation import free_in_pieces, pieces_of_rules
from ratelimit_sidecar.limiter.limiter import Retired
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.threads import in_daemon_thread

MAX_PROBLEMS_LOGGED = 20
"""The most problems logged for one attempt; a file that is no YAML has thousands."""

MAX_DOMAINS_LOGGED = 20
"""The most domains logged that have no rules any more."""

_Result = TypeVar("_Result")

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRules:
    """The rules in force.

    Args:
        rules: the number of rules.
        version: as the source calls it; "" if the source has no versions.
        at_us: when they were put in force, in microseconds since the epoch.
    """

    rules: int
    version: str
    at_us: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """Rules that could not be put in force.

    Args:
        problems: at least one.
    """

    version: str
    at_us: int
    problems: Sequence[Problem]


class Reloader:
    """Puts rules in force, and remembers why newer ones are not.

    Args:
        use_rules: puts rules in force, all at once; returns what they replaced, to be freed, if anything.
        now_us: wall clock in microseconds.
        source: where the rules come from, for people.
        loaded: the rules in force from the start; None if the source has not given any yet.
    """

    slow_read_seconds = 30.0
    """After this time reading the rules counts as slow, and is reported; 200,000 rules take less."""

    def __init__(
        self, use_rules: Callable[[Rules], Retired | None], now_us: Callable[[], int], source: str, loaded: Rules | None
    ) -> None:
        self.source = source
        self.degraded_reason = ""
        """Why changes at the source may be noticed late; "" if they are not. Set by the source."""
        self.loads = {"success": 0, "error": 0}
        """Attempts since start, the first one included."""
        self.loaded: LoadedRules | None = None
        """None until the source has given rules."""
        self.has_rules = asyncio.Event()
        """Set once the source has given rules."""
        self.rejected: Rejected | None = None
        """The newest attempt, if it failed."""
        self._use_rules = use_rules
        self._now_us = now_us
        if loaded is not None:
            self._note_success("", _count(loaded))

    @property
    def last_success_us(self) -> int | None:
        """When the rules in force were loaded."""
        return None if self.loaded is None else self.loaded.at_us

    async def load(self, read: Callable[[], Rules], version: str = "") -> Rejected | None:
        """Read rules and put them in force.

        Args:
            read: runs in a thread, and raises ConfigError for rules that cannot be used.

        Returns:
            None, or why they were rejected; then the former rules stay in force.
        """
        try:
            with _without_collections():
                rules, count = await self.read_in_thread(lambda: _read_and_count(read))
            retired = self._use_rules(rules)
        except ConfigError as error:
            self.note_rejection(version, error.problems)
        except Exception:
            # A bug that some rules trigger must not end the process: the next rules may work.
            _log.exception("rules_load_failed", source=self.source, version=version)
            self.note_rejection(version, [Problem(self.source, None, None, "", "what this program failed at")])
        else:
            self._note_success(version, count)
            _log.info("rules_loaded", source=self.source, version=version, rules=count)
            if retired is not None:
                gone = set() if retired.rules is None else retired.rules.domains.keys() - rules.domains.keys()
                if gone:
                    # It may have moved to another file, which comes later.
                    _log.warning("domains_gone", domains=sorted(gone)[:MAX_DOMAINS_LOGGED], count=len(gone))
                await asyncio.to_thread(_give_back, retired)
        return self.rejected

    async def read_in_thread(self, work: Callable[[], _Result]) -> _Result:
        """Run `work`, which reads the source, in a thread.

        If it takes too long, as on a network file system that hangs, `degraded_reason` says so until it is done. Do not
        read anything else meanwhile: it would hang as well.

        Raises:
            Exception: what `work` raises.
        """
        working = asyncio.ensure_future(in_daemon_thread("rules", work))
        try:
            await asyncio.wait([working], timeout=self.slow_read_seconds)
            if not working.done():
                former, self.degraded_reason = (
                    self.degraded_reason,
                    f"reading them has taken more than {self.slow_read_seconds:g} s so far",
                )
                _log.error(
                    "rules_not_read", source=self.source, why=self.degraded_reason, in_force="the rules from before"
                )
                await asyncio.wait([working])
                self.degraded_reason = former
            return working.result()
        finally:
            working.cancel()
            # An exception in it refers to this frame by its traceback: a reference cycle, which is never collected.
            del working

    def _note_success(self, version: str, count: int) -> None:
        self.loads["success"] += 1
        self.loaded = LoadedRules(count, version, self._now_us())
        self.rejected = None
        self.has_rules.set()

    def note_rejection(self, version: str, problems: Sequence[Problem], in_force: str = "") -> None:
        """Remember and log what could not be put in force.

        Args:
            in_force: what is, for people; the rules from before unless said otherwise.
        """
        self.loads["error"] += 1
        self.rejected = Rejected(version, self._now_us(), problems)
        for problem in problems[:MAX_PROBLEMS_LOGGED]:
            _log.error("rules_problem", **{name: value for name, value in asdict(problem).items() if value})
        _log.error(
            "rules_rejected",
            source=self.source,
            version=version,
            problems=len(problems),
            in_force=in_force or ("none" if self.loaded is None else "the rules from before"),
        )


def _read_and_count(read: Callable[[], Rules]) -> tuple[Rules, int]:
    rules = read()
    return rules, _count(rules)


def _count(rules: Rules) -> int:
    return sum(1 for _ in rules)


def _give_back(retired: Retired) -> None:
    """Free what was replaced in small steps (see `config.reclamation`), so that the loop can take Python's lock in
    between.
    """
    for owned in (retired.plans, retired.compiled, retired.counts):
        while owned:
            owned.popitem()
    rules, retired.rules = retired.rules, None
    if rules is not None:
        pieces = pieces_of_rules(rules.domains.values())
        pieces += rules.names
        del rules
        free_in_pieces(pieces)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Suspend garbage collection while rules are read in a thread. It would hold Python's lock while it looks at all
    new objects again and again, for 220 ms at a time with 10,000 rules (measured).

    Garbage among young objects, a few thousand at most, is collected first, because `gc.freeze` keeps it. What is alive
    at the end is frozen. Rules have no reference cycles, so old ones are freed without a collection.
    """
    is_collecting = gc.isenabled()
    if is_collecting:
        gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if is_collecting:
            gc.enable()
