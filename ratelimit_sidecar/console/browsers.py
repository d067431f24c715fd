"""Protects the console from other sites' pages in a browser that can reach it: an ASGI middleware.

Such a page can do two things. It can send a request whose answer it cannot read, as POST /json, which spends tokens.
Then the browser names the page's site in Origin or Sec-Fetch-Site. And it can let its own domain name resolve to the
console's address (DNS rebinding), and then read all answers. Then only Host shows the name, since browsers send no
Sec-Fetch headers over plain HTTP. So Host has to be a name that nobody else can own: an IP address, a name without a
dot or in a private zone, this machine's own name, or one that is configured.

Probes and scrapers send any Host, and their answers need no protection: their paths are not checked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ratelimit_sidecar.console.requests import PROBES, SCRAPE

_PRIVATE_ZONES = (".localhost", ".local", ".internal", ".svc", ".home.arpa")
"""RFC 6761, RFC 6762, ICANN's .internal, RFC 8375; Kubernetes' `name.namespace.svc` beside its .cluster.local."""

_OTHER_SITE = JSONResponse({"error": "refused: a page of another site asks for this"}, 403)


def require_json(request: Request) -> None:
    """Require a JSON content type for a POST. A page of another site can send that only after a preflight request,
    which is not answered.

    Raises:
        HTTPException: 415.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected the header Content-Type: application/json")


class BrowserGuard:
    """Refuses requests that pages of other sites make a browser send; wraps an ASGI application.

    Args:
        names: further names of hosts under which the console is reached.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower().rstrip(".") for name in (socket.gethostname(), socket.getfqdn(), *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["path"] not in {*PROBES, SCRAPE}:
            headers = Headers(scope=scope)
            if not self._is_ours(headers.get("host", "")):
                app = _foreign_host(headers["host"])
            elif scope["method"] not in {"GET", "HEAD"} and _is_of_other_site(headers):
                app = _OTHER_SITE
        await app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        """Whether Host is a name of this console. HTTP/1.0, which no browser speaks, has no Host; that is accepted."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return "." not in name or name in self._names or name.endswith(_PRIVATE_ZONES) or _is_address(name)


def _foreign_host(host: str) -> JSONResponse:
    error = f"refused: {host} is not known as a name of this console; listen.admin_names can say that it is"
    return JSONResponse({"error": error}, 403)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_of_other_site(headers: Headers) -> bool:
    if headers.get("sec-fetch-site", "none") not in {"same-origin", "none"}:
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True
