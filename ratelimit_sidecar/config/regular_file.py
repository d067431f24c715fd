"""Reads files that may be replaced by anything while the sidecar runs.

Reading a FIFO, a device or a socket may block for ever. They are refused, without blocking.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular_file(path: Path, max_bytes: int = -1) -> bytes:
    """The content of a file.

    Args:
        max_bytes: the most bytes to read; -1 for all.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a FIFO or a device, not a regular file", str(path))
        return stream.read(max_bytes)
