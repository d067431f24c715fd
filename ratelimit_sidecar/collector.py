"""Has CPython's cycle collector look at young objects before they are many.

It counts container objects made less those freed, and looks at the young ones when that reaches its threshold. Where as
many are freed as are made it does not, until a hundred thousand are young; and then the loop stops for a tenth of a
second. So who makes objects that stay for seconds, while others like them go, notes them here.
"""

from __future__ import annotations

import gc
from typing import Final

MOST_YOUNG: Final = 1_000
"""To look at so many takes half a millisecond."""


class YoungObjects:
    """Counts what is made, whatever is freed."""

    def __init__(self) -> None:
        self._made = 0

    def note(self, objects: int) -> None:
        """So many container objects were made, and are to stay. Every `MOST_YOUNG` of them, the young are collected.

        While collections are suspended nothing is: rules are being read, and all that they are made of is young.

        Args:
            objects: at least 1; about.
        """
        self._made += objects
        if self._made >= MOST_YOUNG and gc.isenabled():
            self._made = 0
            gc.collect(1)


young_objects: Final = YoungObjects()
"""Of this process, as the collector is."""
