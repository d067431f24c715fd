"""`ratelimit-sidecar peers`: the replication mesh as one running sidecar sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from ratelimit_sidecar.cli.admin import UNREACHABLE, Unanswered, admin_option, ask, printable
from ratelimit_sidecar.cli.table import table

NOT_CONNECTED = 1

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
"""Explanations of column heads."""


class _PeersCommand(click.Command):
    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """What the columns mean."""
        with formatter.section("Columns"):
            formatter.write_dl(_COLUMNS)
            formatter.write_paragraph()
            formatter.write_text("A dash stands for what is not known, or not told by a sidecar of another version.")


@click.command(cls=_PeersCommand, short_help="Show the sidecars that a running one shares its limits with.")
@admin_option
@click.option("--json", "as_json", is_flag=True, help="Print what the sidecar's /peers answers, in place of the table.")
def peers(admin_url: str, as_json: bool) -> None:
    """Ask a running sidecar for its peers: who is connected, how far behind they are, why the last connection ended.

    Exits with 0 when every peer is connected, with 1 when one is not, with 2 when the sidecar does not answer.
    """
    try:
        body = ask(admin_url, "/peers", needs={"peers": list}, expected="list of peers")
    except Unanswered as error:
        click.echo(str(error), err=True)
        sys.exit(UNREACHABLE)
    found: Sequence[Mapping[str, Any]] = body["peers"]
    click.echo(json.dumps(body, ensure_ascii=False, indent=2) if as_json else "\n".join(_text(body, found)))
    sys.exit(0 if all(peer["connected"] for peer in found) else NOT_CONNECTED)


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
        printable(peer["node"]) or _UNKNOWN,
        printable(peer["region"]) or _UNKNOWN,
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
        printable(peer["last_error"]),
    )


def _version(peer: Mapping[str, Any]) -> str:
    version, protocol = peer.get("version"), peer.get("protocol")
    return f"{printable(version)} ({protocol})" if version else _UNKNOWN


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
