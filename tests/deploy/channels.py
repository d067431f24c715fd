"""What Alertmanager sends its messages to, on loopback: a mail server, and HTTP servers that speak as Slack, PagerDuty,
Telegram and a webhook do."""

from __future__ import annotations

import asyncio
import email.policy
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any

import uvicorn
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_sidecar.demo.ports import HOST

PAGERDUTY_KEY = "0123456789abcdef0123456789abcdef"
TELEGRAM_TOKEN = "123:telegram"
SMTP_PASSWORD = "smtp-secret"


@dataclass
class Message:
    """An alert, as it came through one of the channels.

    Args:
        channel: mail, pagerduty, telegram, webhook, or of Slack the name of the channel.
        text: all that a reader is shown.
    """

    channel: str
    is_resolved: bool
    text: str


@dataclass
class Channels:
    http_port: int = 0
    smtp_port: int = 0
    messages: list[Message] = field(default_factory=list)
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def note(self, message: Message) -> None:
        async with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    async def wait(self, is_there: Callable[[list[Message]], bool], within_s: float = 60.0) -> None:
        async with asyncio.timeout(within_s), self._arrived:
            await self._arrived.wait_for(lambda: is_there(self.messages))

    async def slack(self, request: Request) -> Response:
        assert request.url.path == "/services/T0/B0/slack-secret"
        body = await request.json()
        (attachment,) = body["attachments"]
        is_resolved = attachment["title"].startswith("RESOLVED")
        await self.note(Message(body["channel"], is_resolved, f"{attachment['title']}\n{attachment['text']}"))
        return PlainTextResponse("ok")

    async def pagerduty(self, request: Request) -> Response:
        """Events API v2."""
        body = await request.json()
        assert body["routing_key"] == PAGERDUTY_KEY
        assert body["dedup_key"]
        payload = body["payload"]
        assert payload["severity"] in ("critical", "error", "warning", "info")
        assert payload["source"]
        is_resolved = {"trigger": False, "resolve": True}[body["event_action"]]
        await self.note(Message("pagerduty", is_resolved, f"{payload['summary']}\n{payload['custom_details']}"))
        return JSONResponse(
            {"status": "success", "message": "Event processed", "dedup_key": body["dedup_key"]}, status_code=202
        )

    async def telegram(self, request: Request) -> Response:
        """The Bot API's sendMessage."""
        body = await request.json()
        chat = int(body["chat_id"])
        await self.note(Message("telegram", body["text"].startswith("RESOLVED"), body["text"]))
        result = {"message_id": 1, "date": 0, "chat": {"id": chat, "type": "group"}, "text": body["text"]}
        return JSONResponse({"ok": True, "result": result})

    async def webhook(self, request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        summaries = "\n".join(alert["annotations"]["summary"] for alert in body["alerts"])
        title = f"{body['groupLabels']['alertname']} {body['groupLabels']['region']}"
        await self.note(Message("webhook", body["status"] == "resolved", f"{title}\n{summaries}"))
        return Response()

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 (aiosmtpd's)
        assert session.authenticated
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=email.policy.default)
        body = mail.get_body(("plain",))
        assert body is not None
        subject = str(mail["Subject"])
        await self.note(Message("mail", subject.startswith("RESOLVED"), f"{subject}\n{body.get_content()}"))
        return "250 OK"


def _authenticate(_server: SMTP, _session: object, _envelope: object, _mechanism: str, login: object) -> AuthResult:
    assert isinstance(login, LoginPassword)
    return AuthResult(success=login.password == SMTP_PASSWORD.encode())


@asynccontextmanager
async def serving() -> AsyncIterator[Channels]:
    channels = Channels()
    app = Starlette(
        routes=[
            Route("/services/{rest:path}", channels.slack, methods=["POST"]),
            Route("/v2/enqueue", channels.pagerduty, methods=["POST"]),
            Route(f"/bot{TELEGRAM_TOKEN}/sendMessage", channels.telegram, methods=["POST"]),
            Route("/webhook", channels.webhook, methods=["POST"]),
        ]
    )
    listener = socket.create_server((HOST, 0))
    channels.http_port = listener.getsockname()[1]
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    smtp = await asyncio.get_running_loop().create_server(
        lambda: SMTP(channels, authenticator=_authenticate, auth_require_tls=False, auth_exclude_mechanism=["LOGIN"]),
        HOST,
        0,
    )
    channels.smtp_port = smtp.sockets[0].getsockname()[1]
    serving_http = asyncio.create_task(http.serve([listener]))
    try:
        yield channels
    finally:
        http.should_exit = True
        await serving_http
        smtp.close()
