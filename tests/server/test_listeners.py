import socket
from pathlib import Path

import pytest

from ratelimit_sidecar.server.listeners import ListenError, listen, publish_socket_file


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """A socket file whose server was killed."""
    path = tmp_path / "rls.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
        crashed.listen()
    assert path.is_socket()
    return path


def connect(address: str) -> None:
    if address.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port))).close()


def close(listeners) -> None:
    for listener in listeners:
        listener.close()


def test_a_chosen_port_is_told() -> None:
    listeners = listen(["127.0.0.1:0", "127.0.0.2:0"])
    assert [listener.address for listener in listeners] == [
        f"{listener.socket.getsockname()[0]}:{listener.socket.getsockname()[1]}" for listener in listeners
    ]
    for listener in listeners:
        connect(listener.address)
    close(listeners)


def test_a_name_is_bound_at_all_its_addresses_with_one_port() -> None:
    listeners = listen(["localhost:0"])
    assert len({listener.address for listener in listeners}) == 1
    families = {found[0] for found in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    assert {listener.socket.family for listener in listeners} <= families
    connect(listeners[0].address)
    close(listeners)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_ipv6_wildcard_takes_ipv4_too() -> None:
    listeners = listen(["[::]:0"])
    port = listeners[0].address.removeprefix("[::]:")
    connect(f"[::1]:{port}")
    connect(f"127.0.0.1:{port}")
    close(listeners)


def test_a_taken_port_is_named_and_nothing_stays_bound(tmp_path: Path) -> None:
    (taken,) = listen(["127.0.0.1:0"])
    path = tmp_path / "rls.sock"
    with pytest.raises(ListenError) as caught:
        listen([f"unix:{path}", taken.address])
    assert str(caught.value) == f"cannot listen on {taken.address}: Address already in use"
    assert not path.exists()
    close([taken])


def test_a_port_is_free_again_after_close() -> None:
    (first,) = listen(["127.0.0.1:0"])
    with socket.create_connection(first.socket.getsockname()) as client:
        accepted, _ = first.socket.accept()
        # The side that closes first waits for stray packets for a minute.
        accepted.close()
        assert client.recv(1) == b""
    first.close()
    close(listen([first.address]))


def test_a_socket_file_left_by_a_crash_is_replaced(stale: Path) -> None:
    listeners = listen([f"unix:{stale}"])
    connect(f"unix:{stale}")
    close(listeners)
    assert not stale.exists()


def test_a_socket_somebody_answers_on_is_in_use(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/rls.sock"
    (live,) = listen([address])
    with pytest.raises(ListenError, match="Address already in use"):
        listen([address])
    connect(address)
    live.close()


def test_a_socket_with_a_full_backlog_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "rls.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ListenError, match="Address already in use"):
            listen([f"unix:{path}"])


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        listen([f"unix:{path}"])
    assert path.read_text() == "data"


def test_closing_leaves_a_successors_socket_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rls.sock"
    (old,) = listen([f"unix:{path}"])
    path.rename(tmp_path / "moved")
    (new,) = listen([f"unix:{path}"])
    old.close()
    connect(new.address)
    new.close()


def test_other_users_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "rls.sock"
    (listener,) = listen([f"unix:{path}"])
    assert path.stat().st_mode & 0o777 == 0o666
    listener.close()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("8081", "expected host:port"),
        (":8081", "expected host:port"),
        ("localhost:", "expected host:port"),
        ("localhost:http", "expected host:port"),
        ("localhost:65536", "expected host:port"),
        ("::1:8081", "an IPv6 address needs brackets"),
        ("unix:", "expected unix:PATH"),
        ("unix:/nowhere/at/all/rls.sock", "No such file or directory"),
        ("unix:/tmp/" + "x" * 200, "path too long"),
        ("192.0.2.1:8081", "Cannot assign requested address"),
    ],
)
def test_an_impossible_address_is_explained(address: str, text: str) -> None:
    with pytest.raises(ListenError, match=text) as caught:
        listen([address])
    assert str(caught.value).startswith(f"cannot listen on {address}: ")


def test_a_socket_file_is_published_only_where_nobody_answers(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'rls.sock'}"
    [live] = listen([address])
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "new"))
        bound.listen()
        with pytest.raises(ListenError, match="Address already in use"):
            publish_socket_file(address, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["rls.sock"]
    live.close()


def test_a_published_socket_file_is_where_clients_look_and_only_there(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound, socket.socket(socket.AF_UNIX) as client:
        bound.bind(str(tmp_path / "new"))
        bound.listen()
        file = publish_socket_file(f"unix:{tmp_path / 'rls.sock'}", tmp_path / "new")
        client.connect(str(tmp_path / "rls.sock"))
    assert [each.name for each in tmp_path.iterdir()] == ["rls.sock"]
    file.remove()
    assert not list(tmp_path.iterdir())
