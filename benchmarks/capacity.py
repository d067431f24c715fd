"""`python -m benchmarks.capacity`: which capacity keeps rejections of honest callers below a wanted rate.

Requests come at random (Poisson), on average a part of the refill rate. What is denied then is the price of chance
alone: it depends on the utilisation and the capacity, not on the rate itself. Decided by the sidecar's own bucket, with
seeded arrivals, so the table comes out the same each time.
"""

from __future__ import annotations

import random

import click

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.token_bucket import TokenBucket

START_US = 1_790_000_000_000_000
REFILL_US = 10_000
"""100 tokens a second; any other rate gives the same table."""

UTILISATIONS = (0.5, 0.7, 0.8, 0.9, 0.95)
CAPACITIES = (1, 2, 3, 5, 10, 15, 20, 30, 50)
REQUESTS = 100_000
SEED = 1


def rejected(capacity: int, utilisation: float, requests: int = REQUESTS) -> float:
    """The part of the requests that is denied, 0 to 1."""
    gap = random.Random(SEED).expovariate
    bucket = TokenBucket(b"k", TokenBucketLimit(1, REFILL_US, capacity), Origin("here", 1), START_US)
    now_us = float(START_US)
    denied = 0
    for _ in range(requests):
        now_us += gap(utilisation / REFILL_US)
        denied += not bucket.take(1, int(now_us))
    return denied / requests


@click.command()
def main() -> None:
    """Print percent of requests denied, by utilisation and capacity."""
    click.echo("utilisation" + "".join(f"{capacity:>9}" for capacity in CAPACITIES) + "   tokens of capacity")
    for utilisation in UTILISATIONS:
        cells = "".join(f"{100 * rejected(capacity, utilisation):>8.2f}%" for capacity in CAPACITIES)
        click.echo(f"{utilisation:>10.0%} {cells}")


if __name__ == "__main__":
    main()
