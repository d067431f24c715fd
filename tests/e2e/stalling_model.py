"""examples/llm-tokens/model.py, but of a request with the header `x-stalls` it never says what it used: its client
hangs up with all of the text. It says its charset."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from starlette.types import Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/llm-tokens"))

import model

answer = model.app


async def stalling(scope: Scope, receive: Receive, send: Send) -> None:
    async def send_or_stall(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name != b"content-type"]
            [content_type] = [value for name, value in message["headers"] if name == b"content-type"]
            message["headers"] = [*headers, (b"content-type", content_type.partition(b";")[0] + b"; charset=utf-8")]
        if b"total_tokens" in message.get("body", b"") and b"x-stalls" in dict(scope["headers"]):
            await asyncio.Event().wait()
        await send(message)

    await answer(scope, receive, send_or_stall)


model.app = stalling

if __name__ == "__main__":
    model.main()
