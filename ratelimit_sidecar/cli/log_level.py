"""`ratelimit-sidecar log-level`: a running sidecar logs from another level on."""

from __future__ import annotations

from pathlib import Path

import click

from ratelimit_sidecar.cli.admin import admin_option, change, printable, token_option
from ratelimit_sidecar.telemetry.logs import LEVELS

_NEEDS = {"level": str, "before": str, "configured": str}


@click.command("log-level", short_help="Log more, or less, without a restart.")
@click.argument("level", type=click.Choice([*LEVELS], case_sensitive=False))
@click.option(
    "--seconds",
    type=click.IntRange(min=1),
    metavar="N",
    help="After so many the configured level holds again; without it, after a restart.",
)
@admin_option
@token_option
def log_level(*, level: str, seconds: int | None, admin_url: str, token_file: Path | None) -> None:
    """Let a running sidecar log from LEVEL on, whatever LOG_LEVEL says.

    \b
      ratelimit-sidecar log-level debug --seconds 600

    Exits with 0 when it is done, with 1 when the sidecar refuses and says why, with 2 when it does not answer.
    """
    asked: dict[str, object] = {"level": level}
    if seconds is not None:
        asked["seconds"] = seconds
    told = change(admin_url, "/log-level", asked, token_file, needs=_NEEDS, expected="level of a log")
    until = f", for {seconds} s" if seconds is not None else ""
    click.echo(printable(f"level {told['level']}{until}; before {told['before']}, configured {told['configured']}"))
