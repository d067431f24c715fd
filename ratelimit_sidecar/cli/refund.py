"""`ratelimit-sidecar reset` and `grant`: give a caller back what it has used up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ratelimit_sidecar.cli.admin import admin_option, change, printable, token_option
from ratelimit_sidecar.cli.descriptor import entries_of

_NEEDS = {"rule": str, "bucket": str, "capacity": int, "replicated": bool, "before": dict, "given": int, "after": dict}


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print what the sidecar answers, in place of text."),
        token_option,
        admin_option,
        click.argument("descriptor", metavar="KEY=VALUE[,KEY=VALUE]..."),
        click.argument("domain"),
    ):
        command = option(command)
    return command


@click.command(short_help="Make a caller's bucket full again, in all regions.")
@_options
def reset(*, domain: str, descriptor: str, admin_url: str, token_file: Path | None, as_json: bool) -> None:
    """Give a caller back all that it has used up: its bucket is full again and owes nothing. Ask any one sidecar; all
    regions follow with its next flush. DOMAIN and the keys and values are those of the request's descriptor, in its
    order. In a value write \\, for a comma.

    \b
      ratelimit-sidecar reset shop plan=gold,user=eve

    Exits with 0 when it is done, with 1 when the sidecar refuses and says why, with 2 when it does not answer.
    """
    _refund(domain, descriptor, None, admin_url, token_file, as_json=as_json)


@click.command(short_help="Give a caller some of its used-up tokens back, in all regions.")
@click.argument("tokens", type=click.IntRange(min=1), metavar="N")
@_options
def grant(*, tokens: int, domain: str, descriptor: str, admin_url: str, token_file: Path | None, as_json: bool) -> None:
    """Give a caller N tokens back. They pay what it owes first, and never make more than a full bucket. Ask any one
    sidecar; all regions follow with its next flush. In a value write \\, for a comma.

    \b
      ratelimit-sidecar grant 500 shop plan=gold,user=eve

    Exits with 0 when it is done, with 1 when the sidecar refuses and says why, with 2 when it does not answer.
    """
    _refund(domain, descriptor, tokens, admin_url, token_file, as_json=as_json)


def _refund(
    domain: str, descriptor: str, tokens: int | None, admin_url: str, token_file: Path | None, *, as_json: bool
) -> None:
    entries = [{"key": key, "value": value} for key, value in entries_of(descriptor)]
    asked: dict[str, object] = {"domain": domain, "entries": entries}
    if tokens is not None:
        asked["tokens"] = tokens
    body = change(admin_url, "/refund", asked, token_file, needs=_NEEDS, expected="level of a bucket")
    click.echo(json.dumps(body, ensure_ascii=False, indent=2) if as_json else "\n".join(_text(body)))


def _text(body: Mapping[str, Any]) -> Iterator[str]:
    yield printable(body["bucket"])
    yield f"  rule    {printable(body['rule'])}, {body['capacity']:,} at most"
    yield f"  before  {_level(body['before'])}"
    yield f"  given   {body['given']:,}" + ("" if body["given"] else ": it was full")
    yield f"  after   {_level(body['after'])}"
    if not body["replicated"]:
        yield "The rule is local: only this sidecar has given it back, and others count for themselves."


def _level(level: Mapping[str, int]) -> str:
    owed = level["debt"]
    return f"{level['remaining']:,} left" + (f", {owed:,} owed" if owed else "")
