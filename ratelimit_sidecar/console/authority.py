"""Decides who may change state over the console: callers with the token in `listen.admin_token_file` or, without such a
file, callers on this machine, who ask on loopback.

Such a request may come from a proxy that anybody can call. Proxies add headers. So without a token file, a request with
such a header is refused.
"""

from __future__ import annotations

import asyncio
import hmac
from pathlib import Path
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ratelimit_sidecar.config.regular_file import read_regular_file

MAX_TOKEN_BYTES: Final = 4_096

_OF_PROXIES: Final = (
    "cf-connecting-ip",
    "client-ip",
    "forwarded",
    "true-client-ip",
    "via",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-envoy-",
    "x-forwarded-",
    "x-real-ip",
    "x-request-id",
)
"""Prefixes of names of headers that proxies add."""

_LOOPBACK: Final = ("127.0.0.1", "::1")
"""Other addresses of loopback are of proxies: Istio's calls the address of its pod from 127.0.0.6."""

_CHALLENGE: Final = {"WWW-Authenticate": "Bearer"}


class Authority:
    """Decides whether a request may change state. Call `require` before changing anything.

    Args:
        token_file: read for each request, so that the token can be replaced; None if there is no token.
    """

    def __init__(self, token_file: Path | None) -> None:
        self._token_file = token_file

    async def require(self, request: Request) -> None:
        """Return if the request may change state.

        Raises:
            HTTPException: 401 without the right token, 403 if a token is needed but none is configured, 503 if the file
                cannot be read.
        """
        if self._token_file is None:
            _require_this_machine(request)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise HTTPException(401, "expected the header Authorization: Bearer TOKEN", _CHALLENGE)
        try:
            token = await asyncio.to_thread(_read, self._token_file)
        except (OSError, ValueError) as error:
            raise HTTPException(503, f"listen.admin_token_file cannot be used: {error}") from error
        if not hmac.compare_digest(given.strip().encode("latin-1"), token):
            raise HTTPException(401, "that is not the token in listen.admin_token_file", _CHALLENGE)


def _require_this_machine(request: Request) -> None:
    ends = request.scope["client"], request.scope["server"]
    if not all(end is not None and end[0] in _LOOPBACK for end in ends):
        raise HTTPException(
            403, "only this machine itself may ask for that, on loopback; listen.admin_token_file lets others do so"
        )
    of_proxy = next((name for name in request.headers if name.startswith(_OF_PROXIES)), None)
    if of_proxy is not None:
        raise HTTPException(
            403, f"a proxy has passed that on (header {of_proxy}); listen.admin_token_file lets others ask for it"
        )


def _read(path: Path) -> bytes:
    token = read_regular_file(path, MAX_TOKEN_BYTES + 1).strip()
    if not token:
        raise ValueError(f"there is no token in {path}")
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token may have {MAX_TOKEN_BYTES} bytes; {path} has more")
    return token
