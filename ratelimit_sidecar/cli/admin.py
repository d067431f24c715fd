"""Requests of commands to a running sidecar, over its admin address."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import click

DEFAULT_ADMIN: Final = "http://127.0.0.1:8080"
TIMEOUT_SECONDS: Final = 5.0

REFUSED: Final = 1
UNREACHABLE: Final = 2


class Unanswered(Exception):
    """The sidecar did not answer; the text has the address and the reason."""


class SidecarRefused(Exception):
    """The sidecar refused the request; the text is the sidecar's."""


def _checked(_context: click.Context, _parameter: click.Parameter, url: str) -> str:
    scheme, host, *_ = urlsplit(url)
    if scheme not in ("http", "https") or not host:
        raise click.BadParameter(f"{url!r} is no URL of the form {DEFAULT_ADMIN}")
    return url.rstrip("/")


admin_option: Final = click.option(
    "--admin",
    "admin_url",
    default=DEFAULT_ADMIN,
    show_default=True,
    metavar="URL",
    callback=_checked,
    help="The admin address (`listen.admin`) of the sidecar to ask.",
)


token_option: Final = click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the token that the sidecar's `listen.admin_token_file` names; without one, only the"
    " sidecar's own machine may ask.",
)


def change(
    admin_url: str,
    path: str,
    asked: Mapping[str, object],
    token_file: Path | None,
    *,
    needs: Mapping[str, type],
    expected: str,
) -> dict[str, Any]:
    """Send a request that changes state, and return the answer. If the sidecar refuses or does not answer, the process
    ends.

    Args:
        asked: sent as JSON.
        token_file: has the token that allows changes.
        needs: keys and types that every answer has.
        expected: the answer in words, for the error.
    """
    try:
        return ask(admin_url, path, needs=needs, expected=expected, post=asked, token=_token(token_file))
    except SidecarRefused as error:
        click.echo(f"refused: {error}", err=True)
        sys.exit(REFUSED)
    except Unanswered as error:
        click.echo(str(error), err=True)
        sys.exit(UNREACHABLE)


def ask(
    admin_url: str,
    path: str,
    *,
    needs: Mapping[str, type],
    expected: str,
    post: Mapping[str, object] | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Send a request, and return the answer.

    Args:
        needs: keys and types that every answer has.
        expected: the answer in words, for the error.
        post: sent as JSON; None for a GET.
        token: allows changes.

    Raises:
        Unanswered: the sidecar cannot be reached, or it is no sidecar.
        SidecarRefused: it refuses and says why.
    """
    url = admin_url + path
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    if post is not None:
        headers["Content-Type"] = "application/json"
    request = Request(url, None if post is None else json.dumps(post).encode(), headers)  # noqa: S310 (see `_checked`)
    # A proxy of the environment is for the way out, and would be asked for its own loopback.
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            body = json.load(response)
    except HTTPError as error:
        with error:
            why = _reason(error)
        if post is not None and why is not None:
            raise SidecarRefused(why) from error
        raise Unanswered(f"{url} answers {error.code}: is it the admin address of a sidecar?") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unanswered(f"{url} can't be reached: {reason}; name the sidecar's listen.admin with --admin") from error
    except ValueError as error:
        raise Unanswered(f"{url} answers no JSON: is it the admin address of a sidecar?") from error
    if not isinstance(body, dict) or not all(isinstance(body.get(name), kind) for name, kind in needs.items()):
        raise Unanswered(f"{url} answers no {expected}: is it the admin address of a sidecar?")
    return body


def _reason(error: HTTPError) -> str | None:
    """Why a sidecar refuses; None if the answer is not a sidecar's."""
    try:
        reason = json.load(error)["error"]
    except (ValueError, TypeError, LookupError, OSError, HTTPException):
        return None
    return printable(reason) if isinstance(reason, str) else None


def printable(told: str) -> str:
    """A text from a peer without control characters, for terminals."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in told)


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
