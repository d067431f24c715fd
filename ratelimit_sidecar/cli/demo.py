"""`ratelimit-sidecar demo`: three regions on this machine, traffic through them, and a check of the promise."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.demo import DemoError
from ratelimit_sidecar.demo.ports import PortTaken, ports_from

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "openclaw"
DEFAULT_KEEP_DURATION_S = 20.0
HIGHEST_BASE_PORT = 65_000
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


@click.command(short_help="Three regions with real Envoys on this machine, and what they admit together.")
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End by itself after so much traffic. Without it, Ctrl-C ends it.",
)
@click.option(
    "--keep",
    is_flag=True,
    help=f"Leave all up for curl after the traffic ({DEFAULT_KEEP_DURATION_S:g} s unless --duration says otherwise), "
    "until Ctrl-C.",
)
@click.option(
    "--observe",
    is_flag=True,
    help="Start Prometheus and Alertmanager too, with the rules of deploy/prometheus: an alert fires during the "
    "traffic and is resolved after it. They must be installed.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=1, max=1_000),
    default=30.0,
    show_default=True,
    help="Requests a second and region, on average.",
)
@click.option(
    "--base-port",
    type=click.IntRange(min=1_024, max=HIGHEST_BASE_PORT),
    default=10_000,
    show_default=True,
    help="The Envoys listen on the three ports after it, everything else on others up to 52 above.",
)
def demo(duration: float | None, keep: bool, observe: bool, rate: float, base_port: int) -> None:
    """Start three regions on this machine, each with a real Envoy and a sidecar, and the OpenClaw Rating API behind
    them; send traffic through all three and compare what they admit together with what one global bucket would.

    Exits with 0 when the promise was kept, with 1 when it was not or something did not start.
    """
    try:
        # Here, for without the demo's packages the other commands must work.
        from ratelimit_sidecar.demo.observe import addresses  # noqa: PLC0415
        from ratelimit_sidecar.demo.run import run  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        raise click.ClickException(
            f"the demo needs the package {missing.name}: pip install 'ratelimit-sidecar[demo]'"
        ) from None
    if not EXAMPLES.is_dir():
        raise click.ClickException(
            f"the demo needs {EXAMPLES}, which a checkout of the repository has and an installed package has not"
        )
    if keep and duration is None:
        duration = DEFAULT_KEEP_DURATION_S
    try:
        verdict = asyncio.run(
            run(
                examples=EXAMPLES,
                ports=ports_from(base_port, 3),
                rate=rate,
                duration_s=duration,
                keep=keep,
                observers=addresses(base_port) if observe else None,
            )
        )
    except PortTaken as taken:
        raise click.ClickException(f"{taken}; use --base-port N for other ports") from None
    except (DemoError, ConfigError) as error:
        raise click.ClickException(str(error)) from None
    except asyncio.CancelledError:
        sys.exit(INTERRUPTED)
    sys.exit(0 if verdict.broken is None else 1)
