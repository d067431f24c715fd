"""What the cycle collector would look at first, for tests of what `ratelimit_sidecar.cycle_collector` is told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_when_told() -> Iterator[Callable[[], list[object]]]:
    """Meanwhile the collector looks at nothing unless it is told to; gives what returns all objects that are young."""
    gc.collect()
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        yield lambda: [found for generation in (0, 1) for found in gc.get_objects(generation)]
    finally:
        gc.set_threshold(*thresholds)
