"""`ratelimit-sidecar peers`: the replication mesh as one running sidecar sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import click

from ratelimit_sidecar.cli.table import table

DEFAULT_ADMIN = "http://127.0.0.1:8080"
TIMEOUT_SECONDS = 5.0
NOT_CONNECTED = 1
UNREACHABLE = 2

_UNKNOWN = "-"
_RULES = {True: "same", False: "DIFFER", None: _UNKNOWN}
_HEAD = (
    "node",
    "region",
    "address",
    "connected",
    "version",
    "rules",
    "lag",
    "sent",
    "received",
    "batches out/in",
    "pending",
    "resyncs",
    "refused",
    "reconnects",
    "clock",
    "last error",
)
_COLUMNS = (
    ("version", "Of the peer's software, and of the protocol spoken with it."),
    ("rules", "Whether the peer's rules are the same as this sidecar's."),
    ("lag", "Age of the oldest change here that the peer has not acknowledged; with none, what the last one took."),
    ("sent, received", "Bytes on the streams with the peer, since this sidecar started."),
    ("batches out/in", "Of changes, sent to the peer and received from it."),
    ("pending", "Buckets of which the peer has something yet to be sent."),
    ("resyncs", "Buckets exchanged because a comparison of both nodes found that they differ."),
    ("refused", "What the peer told and this sidecar does not believe, by reason; of an honest peer there is none."),
    ("reconnects", "Times that the peer came back after it was lost."),
    ("clock", "The peer's, less this sidecar's."),
)
"""What is not clear by its head."""


class _PeersCommand(click.Command):
    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """What the columns mean."""
        with formatter.section("Columns"):
            formatter.write_dl(_COLUMNS)
            formatter.write_paragraph()
            formatter.write_text("A dash stands for what is not known, or not told by a sidecar of another version.")


class _Unreachable(Exception):
    """Its text names the address and what came of it."""


@click.command(cls=_PeersCommand, short_help="Show the sidecars that a running one shares its limits with.")
@click.option(
    "--admin",
    "admin_url",
    default=DEFAULT_ADMIN,
    show_default=True,
    metavar="URL",
    help="The admin address (`listen.admin`) of the sidecar to ask.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what the sidecar's /peers answers, in place of the table.")
def peers(admin_url: str, as_json: bool) -> None:
    """Ask a running sidecar for its peers: who is connected, how far behind they are, why the last connection ended.

    Exits with 0 when every peer is connected, with 1 when one is not, with 2 when the sidecar does not answer.
    """
    scheme, host, *_ = urlsplit(admin_url)
    if scheme not in ("http", "https") or not host:
        raise click.BadParameter(f"{admin_url!r} is no URL of the form {DEFAULT_ADMIN}", param_hint="--admin")
    try:
        body = _ask(f"{admin_url.rstrip('/')}/peers")
    except _Unreachable as error:
        click.echo(str(error), err=True)
        sys.exit(UNREACHABLE)
    found: Sequence[Mapping[str, Any]] = body["peers"]
    click.echo(json.dumps(body, ensure_ascii=False, indent=2) if as_json else "\n".join(_text(body, found)))
    sys.exit(0 if all(peer["connected"] for peer in found) else NOT_CONNECTED)


def _ask(url: str) -> dict[str, Any]:
    # A proxy of the environment is for the way out, and would be asked for its own loopback.
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_SECONDS) as response:
            body = json.load(response)
    except HTTPError as error:
        with error:
            raise _Unreachable(f"{url} answers {error.code}: is it the admin address of a sidecar?") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _Unreachable(f"{url} can't be reached: {reason}; name the sidecar's listen.admin with --admin") from error
    except ValueError as error:
        raise _Unreachable(f"{url} answers no JSON: is it the admin address of a sidecar?") from error
    if not isinstance(body, dict) or not isinstance(body.get("peers"), list):
        raise _Unreachable(f"{url} answers no list of peers: is it the admin address of a sidecar?")
    return body


def _text(body: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    connected = sum(peer["connected"] for peer in found)
    who = f"{body['node']} in {body['region']}"
    if not found:
        yield f"{who}: no peers; none is configured, and none has called"
        return
    yield f"{who}: {connected} of {len(found)} {'peer' if len(found) == 1 else 'peers'} connected"
    yield ""
    yield from table(_HEAD, map(_row, found), texts=_HEAD.index("lag"))


def _row(peer: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _printable(peer["node"]) or _UNKNOWN,
        _printable(peer["region"]) or _UNKNOWN,
        peer["address"],
        "yes" if peer["connected"] else "NO",
        _version(peer),
        _RULES[peer.get("rules_match")],
        _duration(peer["lag_seconds"]),
        _size(peer.get("bytes_sent")),
        _size(peer.get("bytes_received")),
        f"{peer['batches_sent']:,}/{peer['batches_received']:,}",
        f"{peer['pending_buckets']:,}",
        _count(peer.get("resyncs")),
        _refused(peer.get("refused")),
        f"{peer['reconnects']:,}",
        _offset(peer["clock_offset_seconds"]),
        _printable(peer["last_error"]),
    )


def _printable(told: str) -> str:
    """What a peer has told, without what a terminal would take for a command or for a line's end."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in told)


def _version(peer: Mapping[str, Any]) -> str:
    version, protocol = peer.get("version"), peer.get("protocol")
    return f"{_printable(version)} ({protocol})" if version else _UNKNOWN


def _duration(seconds: float) -> str:
    return f"{seconds * 1_000:,.1f} ms" if abs(seconds) < 1 else f"{seconds:,.1f} s"


def _offset(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{'-' if seconds < 0 else '+'}{_duration(abs(seconds))}"


def _refused(refused: Mapping[str, int] | None) -> str:
    if refused is None:
        return _UNKNOWN
    return ", ".join(f"{why} {count:,}" for why, count in sorted(refused.items())) or "0"


def _count(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number:,}"


def _size(size: int | None) -> str:
    if size is None:
        return _UNKNOWN
    scaled = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if scaled < 1_000 or unit == "GB":
            break
        scaled /= 1_000
    return f"{size} B" if unit == "B" else f"{scaled:,.1f} {unit}"
