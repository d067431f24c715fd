"""What Envoys are asked for, and how that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Final

GONE: Final = -1.0
"""In place of a demand: the Envoy has died."""

STEP_S: Final = 40
"""Between two changes."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """How much each of some Envoys is asked for, and how that changes.

    Args:
        phases: of `STEP_S` each, by the number of an Envoy its requests a second from then on.
    """

    name: str
    title: str
    envoys: int
    phases: tuple[Mapping[int, float], ...]


def scenarios() -> list[Scenario]:
    chance = Random(1)
    mixed = tuple({number: chance.choice((0, 5, 20, 60)) for number in range(20)} for _ in range(4))
    return [
        Scenario("moves", "400:40:40, and the 400 move", 3, ({0: 400, 1: 40, 2: 40}, {0: 40, 1: 400})),
        Scenario("crowd", "ten of 20, and one gets 1,000", 10, (dict.fromkeys(range(10), 20.0), {3: 1_000})),
        Scenario(
            "joins", "three of 200, and three more", 6, (dict.fromkeys(range(3), 200.0), {3: 200, 4: 200, 5: 200})
        ),
        Scenario(
            "dies", "four of 150, and two die", 4, (dict.fromkeys(range(4), 150.0), {0: GONE, 1: GONE, 2: 300, 3: 300})
        ),
        Scenario("mixed", "twenty of 0 to 60, all drawn anew", 20, mixed),
    ]
