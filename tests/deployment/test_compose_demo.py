"""docker-compose.yml on a real engine: a region is cut off and healed under traffic, and the promise is kept."""

from __future__ import annotations

import pytest
from rich.console import Console

from deployment.cache import Unavailable
from deployment.compose import Demo, up
from deployment.engine import Engine
from deployment.images import make_others

pytestmark = pytest.mark.deployment


async def test_three_regions_keep_their_promise_before_and_after_one_of_them_was_cut_off(docker: Engine) -> None:
    try:
        make_others(docker)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
    with up(docker):
        await Demo(docker, Console(highlight=False)).run()
