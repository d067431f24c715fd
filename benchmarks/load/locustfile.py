"""Callers of three regions, each an agent that asks the Envoy nearest to it ten times a second.

    make demo                    three regions on this machine, or give the Envoys' addresses in URLS
    locust --locustfile benchmarks/load/locustfile.py --headless --users 60 --run-time 30s

The environment may have URLS (comma-separated) and AGENTS. Locust's table has a line for each region; a denial (429) is
counted as an answer, whatever else is not 200 as a failure, and then Locust exits with 1.
"""

from __future__ import annotations

import itertools
import os

from locust import FastHttpUser, constant_throughput, task

URLS = os.environ.get("URLS", "http://127.0.0.1:10001,http://127.0.0.1:10002,http://127.0.0.1:10003").split(",")
AGENTS = int(os.environ.get("AGENTS", "100"))
REQUESTS_PER_SECOND = 10

_numbers = itertools.count()


class Agent(FastHttpUser):
    host = URLS[0]
    wait_time = constant_throughput(REQUESTS_PER_SECOND)

    def on_start(self) -> None:
        """Agents are dealt out to the regions in turn."""
        number = next(_numbers)
        self.url = URLS[number % len(URLS)]
        self.agent = number % AGENTS

    @task
    def ask(self) -> None:
        url = f"{self.url}/rate?agent=agent-{self.agent}"
        with self.client.get(url, name=self.url, catch_response=True) as answer:
            if answer.status_code in (200, 429):
                answer.success()
            else:
                answer.failure(f"status {answer.status_code}")
