"""Descriptors are shared out before anybody takes them."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from ratelimit_sidecar.server.file_limit import FileLimits, raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
given = raise_file_limit(FileLimits(clients=800, mesh=200, proxies=int(sys.argv[3])))
print(given.clients, given.mesh, given.proxies, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "clients", "mesh", "proxies", "raised"),
    [
        (256, 4_000, 0, 800, 200, 0, 1_512),
        (2_000, 4_000, 0, 800, 200, 0, 2_000),
        (256, 1_112, 0, 480, 120, 0, 1_112),
        (300, 300, 0, 120, 30, 0, 300),
        (256, 4_000, 1_000, 800, 200, 1_000, 2_512),
        (256, 1_512, 1_000, 400, 100, 500, 1_512),
    ],
)
def test_the_soft_limit_is_raised_and_what_is_missing_is_missing_to_connections(
    soft: int, hard: int, wanted: int, clients: int, mesh: int, proxies: int, raised: int
) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(soft), str(hard), str(wanted)]
    ran = subprocess.run(argv, capture_output=True, check=True)
    assert ran.stdout.split() == [b"%d" % each for each in (clients, mesh, proxies, raised)]
