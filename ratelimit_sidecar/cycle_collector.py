"""Makes CPython's cycle collector look at young objects before there are many.

The collector counts container objects made, less those freed, and looks at the young ones when that count reaches its
threshold. Where as many are freed as are made, the count stays low until a hundred thousand objects are young; looking
at these then stops the loop for a tenth of a second. So code that makes objects that stay for seconds, while others
like them are freed, notes them here.
"""

from __future__ import annotations

import gc
from typing import Final

MOST_YOUNG: Final = 1_000
"""Looking at this many objects takes half a millisecond."""


class YoungObjects:
    """Counts objects made, without those freed. Call `note` wherever objects are made that stay."""

    def __init__(self) -> None:
        self._made = 0

    def note(self, objects: int) -> None:
        """Note that container objects were made that will stay. After every `MOST_YOUNG` of them young objects are
        collected.

        Nothing is collected while collections are suspended: then rules are being read, and all their objects are
            young.

        Args:
            objects: about how many; at least 1.
        """
        self._made += objects
        if self._made >= MOST_YOUNG and gc.isenabled():
            self._made = 0
            gc.collect(1)


young_objects: Final = YoungObjects()
"""The one counter of this process, which has one collector."""
