"""What takes minutes to build is kept outside the checkout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratelimit-sidecar"


class Unavailable(Exception):
    """It cannot be had on this machine; the text says why."""
