"""`ratelimit-sidecar peers`"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner, Result
from console.small_console import Console
from observed import peer

from ratelimit_sidecar.cli import main
from ratelimit_sidecar.mesh_status import PeerStatus

NEAR = replace(
    peer(),
    node="eu-1",
    region="eu-west-2",
    address="10.0.0.2:50051",
    connected=True,
    lag_seconds=0.0222,
    pending_buckets=1_234,
    batches_sent=12_345,
    batches_received=12,
    reconnects=2,
    clock_offset_seconds=-0.0015,
    last_error="",
)
FAR = replace(
    NEAR,
    node="",
    region="",
    address="10.0.0.3:50051",
    connected=False,
    lag_seconds=90.0,
    clock_offset_seconds=None,
    last_error="refused",
)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """The URL of a server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/peers" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def body_of(*peers: PeerStatus, **told: object) -> bytes:
    """What a console with these peers answers; `told` is what it tells of each besides."""
    console = Console()
    console.peers = peers
    body = (await console.get("/peers")).json()
    return json.dumps({**body, "peers": [{**each, **told} for each in body["peers"]]}).encode()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["peers", *arguments])


async def test_a_table_tells_of_every_peer_and_exits_with_1_when_one_is_not_connected() -> None:
    told = {
        "version": "0.2.0",
        "protocol": 3,
        "rules_match": True,
        "bytes_sent": 1_234_567,
        "bytes_received": 999,
        "resyncs": 4,
        "refused": {"own": 1_234, "ahead": 9},
    }
    with answering(200, await body_of(NEAR, FAR, **told)) as url:
        result = run("--admin", url)
    assert result.output == (
        "us-1 in us-east-1: 1 of 2 peers connected\n"
        "\n"
        "node  region     address         connected  version    rules      lag    sent  received  batches out/in"
        "  pending  resyncs             refused  reconnects    clock  last error\n"
        "eu-1  eu-west-2  10.0.0.2:50051  yes        0.2.0 (3)  same   22.2 ms  1.2 MB     999 B       12,345/12"
        "    1,234        4  ahead 9, own 1,234           2  -1.5 ms\n"
        "-     -          10.0.0.3:50051  NO         0.2.0 (3)  same    90.0 s  1.2 MB     999 B       12,345/12"
        "    1,234        4  ahead 9, own 1,234           2        -  refused\n"
    )
    assert result.exit_code == 1


async def test_it_exits_with_0_when_all_are_connected() -> None:
    with answering(200, await body_of(NEAR, NEAR)) as url:
        result = run("--admin", f"{url}/")
    assert result.output.startswith("us-1 in us-east-1: 2 of 2 peers connected\n")
    assert result.exit_code == 0


async def test_without_peers_it_says_so_and_exits_with_0() -> None:
    with answering(200, await body_of()) as url:
        result = run("--admin", url)
    assert (result.exit_code, result.output) == (
        0,
        "us-1 in us-east-1: no peers; none is configured, and none has called\n",
    )


async def test_what_a_sidecar_of_another_version_does_not_tell_is_a_dash() -> None:
    body = json.loads(await body_of(NEAR))
    for name in ("version", "protocol", "rules_match", "bytes_sent", "bytes_received", "resyncs", "refused"):
        body["peers"][0].pop(name, None)
    with answering(200, json.dumps(body).encode()) as url:
        result = run("--admin", url)
    cells = result.output.splitlines()[-1].split()
    assert cells[4:6] == ["-", "-"]
    assert cells[8:10] == ["-", "-"]


async def test_nothing_that_a_peer_has_told_moves_the_cursor_or_ends_the_line() -> None:
    told = {"node": "\x1b[2J", "region": "a\nb", "version": "\r1", "last_error": "caf\u00e9 \u202e"}
    with answering(200, await body_of(NEAR, **told)) as url:
        result = run("--admin", url)
    line = result.output.splitlines()[-1]
    assert line.startswith("\\x1b[2J  a\\nb    10.0.0.2:50051  yes        \\r1 (3)")
    assert line.endswith("  caf\u00e9 \\u202e")


async def test_rules_that_differ_stand_out() -> None:
    with answering(200, await body_of(NEAR, rules_match=False)) as url:
        result = run("--admin", url)
    assert "DIFFER" in result.output


async def test_as_json_it_is_what_the_console_answers() -> None:
    body = await body_of(NEAR, FAR)
    with answering(200, body) as url:
        result = run("--admin", url, "--json")
    assert json.loads(result.output) == json.loads(body)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, b"", "answers 503"),
        (200, b"<html>", "answers no JSON"),
        (200, b"{}", "answers no list of peers"),
        (200, b"[]", "answers no list of peers"),
    ],
)
def test_an_answer_that_is_no_sidecars_exits_with_2_and_names_the_address(
    status: int, body: bytes, expected: str
) -> None:
    with answering(status, body) as url:
        result = run("--admin", url)
    assert result.exit_code == 2
    assert result.output == f"{url}/peers {expected}: is it the admin address of a sidecar?\n"


def test_when_nobody_answers_it_exits_with_2_and_says_what_to_name() -> None:
    with answering(200, b"") as url:
        pass
    result = run("--admin", url)
    assert result.exit_code == 2
    assert result.output.startswith(f"{url}/peers can't be reached: ")
    assert "--admin" in result.output


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://here", "http://"])
def test_an_address_that_is_no_url_is_told_with_an_example_of_one(url: str) -> None:
    result = run("--admin", url)
    assert result.exit_code == 2
    assert "http://127.0.0.1:8080" in result.output


def test_the_help_explains_the_columns() -> None:
    result = run("--help")
    for column in ("lag", "pending", "resyncs", "refused", "reconnects", "clock"):
        assert f"\n  {column} " in result.output
