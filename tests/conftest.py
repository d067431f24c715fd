"""Hypothesis profiles: the sources are tested with the default one, in `make test` what is compiled with the quick one;
`HYPOTHESIS_PROFILE=nightly make test` runs the long one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import Phase, settings

# No deadline: on a busy machine a slow example says nothing about the code.
settings.register_profile("default", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)
# Of what fails nobody reads the example (dev/mutations).
settings.register_profile("unshrunk", deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
settings.register_profile("nightly", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """For tests that configure the logs of the process: others are told nothing of it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
