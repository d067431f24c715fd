"""One Docker engine for all tests of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployment.cache import Unavailable
from deployment.engine import Engine, engine
from deployment.images import build_sidecar, make_base


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    """An engine that has the sidecar's image."""
    try:
        with engine() as running:
            make_base(running)
            build_sidecar(running)
            yield running
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
