"""What a way of enforcing a limit looks like to the simulator.

A policy is made once for a run. It sends what its regions say to each other by `Setup.send`, does what it must do
by itself on `Setup.loop`, and answers every request exactly once: most do so at once, from `LocalPolicy.take`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from simulation.loop import Loop
from simulation.network import Network

Answer = Callable[[bool, int], None]
"""Called with whether the request was admitted, and when that was decided (which can be before the answer arrived)."""

FLUSH_US = 20_000
"""How often regions tell each other what has changed: what the mesh does (docs/replication.md)."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a policy is made of.

    Args:
        names: of the regions.
    """

    limit: TokenBucketLimit
    names: tuple[str, ...]
    network: Network

    @property
    def loop(self) -> Loop:
        return self.network.loop

    @property
    def random(self) -> Random:
        return self.network.random

    @property
    def regions(self) -> range:
        return range(len(self.names))

    def send(self, origin: int, target: int, deliver: Callable[[], None]) -> None:
        """Call `deliver` when a message arrives."""
        self.network.send(self.names[origin], self.names[target], deliver)


class Policy(ABC):
    never_exceeds = False
    """True when it is claimed that it never admits more than the limit."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def request(self, region: int, answer: Answer) -> None:
        """A request for one token arrives at `region` now."""

    @property
    def undelivered(self) -> int | None:
        """The most that a region had not heard of others when it admitted a request; None where nobody listens."""
        return None


class LocalPolicy(Policy):
    """Decides in the region itself, without waiting for anyone."""

    def request(self, region: int, answer: Answer) -> None:
        now_us = self.setup.loop.now_us
        answer(self.take(region, now_us), now_us)

    @abstractmethod
    def take(self, region: int, now_us: int) -> bool:
        """Admit and charge one token, or deny."""
