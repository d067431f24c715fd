"""`ratelimit-sidecar reset` and `grant`: give a caller back what it has used up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ratelimit_sidecar.cli.admin import Refused, Unanswered, admin_option, ask, printable
from ratelimit_sidecar.cli.descriptor import entries_of

REFUSED = 1
UNREACHABLE = 2

_NEEDS = {"rule": str, "bucket": str, "capacity": int, "replicated": bool, "before": dict, "given": int, "after": dict}


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print what the sidecar answers, in place of text."),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="File with the token that the sidecar's `listen.admin_token_file` names; without one, only the"
            " sidecar's own machine may ask.",
        ),
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
    try:
        body = ask(admin_url, "/refund", needs=_NEEDS, called="level of a bucket", post=asked, token=_token(token_file))
    except Refused as error:
        click.echo(f"refused: {error}", err=True)
        sys.exit(REFUSED)
    except Unanswered as error:
        click.echo(str(error), err=True)
        sys.exit(UNREACHABLE)
    click.echo(json.dumps(body, ensure_ascii=False, indent=2) if as_json else "\n".join(_text(body)))


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read: {error}", param_hint="--token-file") from error
    if not token or not token.isprintable():
        raise click.BadParameter(f"{path} holds no token, which is one line of text", param_hint="--token-file")
    return token


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
