"""Descriptors are shared out before anybody takes them."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from ratelimit_sidecar.server.file_limit import FileLimits, raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
given = raise_file_limit(FileLimits(clients=800, mesh=200))
print(given.clients, given.mesh, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "clients", "mesh", "raised"),
    [
        (256, 4_000, 800, 200, 1_640),
        (2_000, 4_000, 800, 200, 2_000),
        (256, 1_200, 480, 120, 1_200),
        (300, 300, 120, 30, 300),
    ],
)
def test_the_soft_limit_is_raised_and_what_is_missing_is_missing_to_connections(
    soft: int, hard: int, clients: int, mesh: int, raised: int
) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(soft), str(hard)], capture_output=True, check=True)
    assert ran.stdout.split() == [b"%d" % each for each in (clients, mesh, raised)]
