"""How many seeds a test of random schedules takes.

The Hypothesis profile says it, as it does for properties (conftest.py).
"""

from __future__ import annotations

from hypothesis import settings


def seeds(few: int, *, thorough: int, nightly: int) -> range:
    """The seeds that a test takes under the profile in use.

    Args:
        few: those of `make test`.
        thorough: those of `make test-slow`.
    """
    count = {"thorough": thorough, "nightly": nightly}.get(settings.get_current_profile_name(), few)
    return range(count)
