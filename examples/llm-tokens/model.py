"""A stand-in for an API of language models, in the form of OpenAI's, which reports what a request has used.

python examples/llm-tokens/model.py --port 8000

POST /v1/chat/completions with {"messages": [{"content": ...}], "max_tokens": N, "stream": true or false} answers the
word "token" N times. It counts a token for each word of the messages and of the answer, 600 at most, and says so in
`usage`: of a stream in the last event before [DONE], if "stream_options": {"include_usage": true} asks for it. It
compresses for clients that accept it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

CONTEXT_TOKENS = 600
"""Of a request's messages and answer together."""

KEEP_ALIVE_SECONDS = 2 * 3_600
"""Envoy closes an idle connection after an hour. Were it closed here, a request could be on its way."""


async def completions(request: Request) -> Response:
    asked = await request.json()
    prompt_tokens = sum(len(message["content"].split()) for message in asked["messages"])
    if prompt_tokens >= CONTEXT_TOKENS:
        return JSONResponse({"error": {"message": f"At most {CONTEXT_TOKENS} tokens."}}, status_code=400)
    completion_tokens = min(int(asked.get("max_tokens", 16)), CONTEXT_TOKENS - prompt_tokens)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if asked.get("stream"):
        told = asked.get("stream_options", {}).get("include_usage", False)
        return StreamingResponse(events(completion_tokens, usage if told else None), media_type="text/event-stream")
    message = {"role": "assistant", "content": " ".join(["token"] * completion_tokens)}
    return JSONResponse({"object": "chat.completion", "choices": [{"message": message}], "usage": usage})


async def events(completion_tokens: int, usage: dict[str, int] | None) -> AsyncIterator[str]:
    for _ in range(completion_tokens):
        yield event({"choices": [{"delta": {"content": "token "}}], "usage": None})
    if usage:
        yield event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def event(chunk: dict[str, object]) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk})}\n\n"


async def healthz(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ok\n")


app = Starlette(
    routes=[Route("/v1/chat/completions", completions, methods=["POST"]), Route("/healthz", healthz)],
    middleware=[Middleware(GZipMiddleware, minimum_size=100)],
)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for an API of language models.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


if __name__ == "__main__":
    main()
