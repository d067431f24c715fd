import os
import random
import socket
import subprocess
import sys

import pytest

from ratelimit_sidecar.demo.ports import HOST, PortTaken, ensure_free, free_ports, ports_from


def test_ports_from_a_base_are_the_documented_ones() -> None:
    ports = ports_from(10_000, 3)

    assert [region.envoy for region in ports.regions] == [10_001, 10_002, 10_003]
    assert [region.envoy_admin for region in ports.regions] == [10_011, 10_012, 10_013]
    assert [region.grpc for region in ports.regions] == [10_021, 10_022, 10_023]
    assert [region.admin for region in ports.regions] == [10_031, 10_032, 10_033]
    assert [region.sync for region in ports.regions] == [10_041, 10_042, 10_043]
    assert ports.upstream == 10_050


def test_free_ports_are_all_different_and_free() -> None:
    ports = free_ports(3).all()

    assert len(set(ports)) == 16
    ensure_free(ports)


def test_a_taken_port_is_named_with_the_process_that_holds_it() -> None:
    with socket.create_server((HOST, 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"^port {port} is taken by .+ \(pid {os.getpid()}\)$"):
            ensure_free([port])


def test_no_port_is_given_twice_before_somebody_listens_there() -> None:
    choose = "import random; random.seed(1); from ratelimit_sidecar.demo.ports import free_ports"
    given = []
    for _ in range(2):
        random.seed(1)
        given += free_ports(3).all()
        other = subprocess.check_output([sys.executable, "-c", f"{choose}; print(*free_ports(3).all())"], text=True)
        given += map(int, other.split())

    # The other process of the first round has ended, and may be followed by that of the second.
    assert len(given) == 4 * 16
    assert len(set(given)) >= 3 * 16
