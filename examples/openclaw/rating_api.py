"""The OpenClaw Rating API: a score for an agent, the same every time it is asked. The upstream of the demo's Envoys.

python examples/openclaw/rating_api.py --port 8000

GET /rate?agent=NAME answers {"agent": NAME, "score": 0 to 100, "grade": "A" to "E"}; without an agent, 400. It knows
nothing of rate limits: Envoy and the sidecar keep them.
"""

from __future__ import annotations

import argparse
import hashlib

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

SCORES = 101
GRADES = "EDCBA"
MAX_AGENT_LENGTH = 200
KEEP_ALIVE_SECONDS = 2 * 3_600
"""Envoy closes an idle connection after an hour. Were it closed here, a request could be on its way."""


def score(agent: str) -> int:
    """0 to 100, from nothing but the name."""
    return int.from_bytes(hashlib.sha256(agent.encode()).digest()[:8], "big") % SCORES


async def rate(request: Request) -> JSONResponse:
    # Envoy limits by the first value. To take another one would let callers choose whose limit they use.
    agent = next(iter(request.query_params.getlist("agent")), "")
    if not 1 <= len(agent) <= MAX_AGENT_LENGTH:
        message = f"name an agent of 1 to {MAX_AGENT_LENGTH} characters: /rate?agent=..."
        return JSONResponse({"error": message}, status_code=400)
    points = score(agent)
    grade = GRADES[min(points * len(GRADES) // 100, len(GRADES) - 1)]
    return JSONResponse({"agent": agent, "score": points, "grade": grade})


async def healthz(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ok\n")


app = Starlette(routes=[Route("/rate", rate), Route("/healthz", healthz)])


def main() -> None:
    parser = argparse.ArgumentParser(description="The OpenClaw Rating API.")
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
