"""Rules that are told apart by their domain, and a reloader that says what it was made to put in force."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from ratelimit_sidecar.config.errors import ConfigError, Problem
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules
from ratelimit_sidecar.rules_source.reloader import Reloader

NOW_US = 1_795_000_000_000_000

BROKEN = "broken"
"""Text, and domain, of what cannot be used."""

LOADED_WITHIN_S = 60.0
"""It takes a fraction of a second; the rest is for a busy machine."""


def rules_of(*domains: str) -> Rules:
    """One rule in each domain."""
    return Rules(
        {
            name: RuleNode(key_only={"user": RuleNode(Rule(f"{name}.user", TokenBucketLimit(1, 1, 1)))})
            for name in domains
        }
    )


def rules_of_texts(texts: Mapping[str, str]) -> Rules:
    """By file: a domain a text.

    Raises:
        ConfigError: for each that is `BROKEN`.
    """
    problems = [
        Problem(file, 3, 5, "domain", "nothing of use", "a domain", "mend it")
        for file, text in texts.items()
        if text == BROKEN
    ]
    if problems:
        raise ConfigError(problems)
    return rules_of(*texts.values())


def rules_of_folder(folder: Path) -> Rules:
    return rules_of_texts({str(file): file.read_text() for file in sorted(folder.glob("*.yaml"))})


class Recorder:
    """A reloader, and the domains it has put in force."""

    def __init__(self, source: str = "somewhere") -> None:
        self.now_us = NOW_US
        self.in_force: list[str] = []
        self.settled = asyncio.Event()
        """That of an `XdsClient`."""
        self._loads: asyncio.Queue[list[str]] = asyncio.Queue()
        self.reloader = Reloader(self._use, lambda: self.now_us, source, None)

    def _use(self, rules: Rules) -> None:
        self.in_force = sorted(rules.domains)
        self._loads.put_nowait(self.in_force)

    async def next_load(self) -> list[str]:
        """The domains of the next rules put in force."""
        async with asyncio.timeout(LOADED_WITHIN_S):
            return await self._loads.get()

    async def until_loaded(self, *domains: str) -> None:
        """Wait until these are in force, whatever is so before."""
        while await self.next_load() != sorted(domains):
            pass
