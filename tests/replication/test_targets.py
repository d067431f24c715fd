"""Which addresses are dialled."""

from __future__ import annotations

import pytest
from replication.builders import NOW_US

from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.targets import GRACE_US, MAX_ADDRESSES, Target, Targets, host_of


def addresses(targets: Targets | list[Target]) -> list[str]:
    return sorted(target.address for target in targets)


class Joined(Stream):
    """A stream whose peer has said who it is."""

    def __init__(self) -> None:
        self.peer = object()  # type: ignore[assignment]


def test_an_ip_address_is_a_target_for_ever_and_a_name_is_none_itself() -> None:
    targets = Targets(["10.0.0.1:1", "[::1]:1", "mesh.example:1", "10.0.0.1:1", "mesh.example:1"])
    assert addresses(targets) == ["10.0.0.1:1", "[::1]:1"]
    assert [name.configured for name in targets.names] == ["mesh.example:1"]
    assert targets.take_retired(NOW_US + 10 * GRACE_US) == []


def test_each_address_of_a_name_is_a_target() -> None:
    targets = Targets(["mesh.example:1"])
    [name] = targets.names
    assert not name.is_settled
    assert addresses(targets.resolved(name, ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.1:1"], NOW_US)) == [
        "10.0.0.1:1",
        "10.0.0.2:1",
    ]
    assert name.is_settled
    assert addresses(targets.resolved(name, ["10.0.0.2:1", "10.0.0.3:1"], NOW_US)) == ["10.0.0.3:1"]


def test_an_address_that_is_gone_is_kept_for_the_time_of_grace() -> None:
    targets = Targets(["mesh.example:1"])
    [name] = targets.names
    targets.resolved(name, ["10.0.0.1:1", "10.0.0.2:1"], NOW_US)
    targets.resolved(name, ["10.0.0.1:1"], NOW_US + 1)
    targets.resolved(name, ["10.0.0.1:1"], NOW_US + GRACE_US)
    assert targets.take_retired(NOW_US + GRACE_US) == []
    assert addresses(targets.take_retired(NOW_US + GRACE_US + 1)) == ["10.0.0.2:1"]
    assert addresses(targets) == ["10.0.0.1:1"]


def test_an_address_that_comes_back_in_time_was_never_gone() -> None:
    targets = Targets(["mesh.example:1"])
    [name] = targets.names
    for at_us, found in ((0, ["10.0.0.1:1", "10.0.0.2:1"]), (1, ["10.0.0.1:1"]), (2, ["10.0.0.1:1", "10.0.0.2:1"])):
        assert len(targets.resolved(name, found, NOW_US + at_us)) == (2 if at_us == 0 else 0)
    assert targets.take_retired(NOW_US + 2 * GRACE_US) == []


@pytest.mark.interpreted
def test_an_address_that_is_gone_is_kept_while_its_stream_lives() -> None:
    targets = Targets(["mesh.example:1"])
    [name] = targets.names
    targets.resolved(name, ["10.0.0.1:1", "10.0.0.2:1"], NOW_US)
    [target] = [each for each in targets if each.address == "10.0.0.2:1"]
    target.stream = Joined()
    targets.resolved(name, ["10.0.0.1:1"], NOW_US)
    assert targets.take_retired(NOW_US + 2 * GRACE_US) == []
    target.stream = None
    assert targets.take_retired(NOW_US + 2 * GRACE_US) == [target]


def test_an_address_of_two_names_stays_until_both_have_lost_it() -> None:
    targets = Targets(["a.example:1", "b.example:1"])
    a, b = targets.names
    assert len(targets.resolved(a, ["10.0.0.1:1"], NOW_US)) == 1
    assert targets.resolved(b, ["10.0.0.1:1"], NOW_US) == []
    targets.resolved(a, ["10.0.0.9:1"], NOW_US)
    assert targets.take_retired(NOW_US + GRACE_US) == []
    targets.resolved(b, ["10.0.0.9:1"], NOW_US + GRACE_US)
    assert addresses(targets.take_retired(NOW_US + 2 * GRACE_US)) == ["10.0.0.1:1"]


def test_an_ip_address_that_a_name_has_lost_is_still_configured() -> None:
    targets = Targets(["10.0.0.1:1", "mesh.example:1"])
    [name] = targets.names
    assert addresses(targets.resolved(name, ["10.0.0.1:1", "10.0.0.2:1"], NOW_US)) == ["10.0.0.2:1"]
    targets.resolved(name, ["10.0.0.2:1"], NOW_US)
    assert targets.take_retired(NOW_US + GRACE_US) == []


def test_a_name_with_absurdly_many_addresses_is_dialled_in_part() -> None:
    targets = Targets(["mesh.example:1"])
    [name] = targets.names
    found = [f"10.0.{number // 256}.{number % 256}:1" for number in range(2 * MAX_ADDRESSES)]
    assert len(targets.resolved(name, found, NOW_US)) == MAX_ADDRESSES


def test_of_a_name_with_both_families_the_one_that_is_not_listened_on_is_not_missed() -> None:
    targets = Targets(["mesh.example:1"])
    [name] = targets.names
    targets.resolved(name, ["10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1", "[fd00::2]:1"], NOW_US)
    assert len(targets.unreached()) == 4
    [first] = [each for each in targets if each.address == "10.0.0.1:1"]
    first.node = "b"
    # The other of the same family is.
    assert addresses(targets.unreached()) == ["10.0.0.2:1"]


@pytest.mark.interpreted
def test_a_target_waits_while_another_one_is_connected_to_its_node() -> None:
    targets = Targets(["10.0.0.1:1", "10.0.0.2:1"])
    one, other = targets
    assert not targets.is_reached_otherwise(one)
    one.node = other.node = "b"
    assert not targets.is_reached_otherwise(one)
    other.stream = Joined()
    assert targets.is_reached_otherwise(one)
    assert not targets.is_reached_otherwise(other)
    one.node = "c"
    assert not targets.is_reached_otherwise(one)


def test_the_host_of_an_address_is_without_port_brackets_and_scheme() -> None:
    for address in ("[::1]:5", "ipv6:[::1]:5", "ipv6:%5B::1%5D:5"):
        assert host_of(address) == "::1"
    for address in ("10.0.0.1:5", "ipv4:10.0.0.1:5"):
        assert host_of(address) == "10.0.0.1"
    assert host_of("mesh.example:5") == "mesh.example"
