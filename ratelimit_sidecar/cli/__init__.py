"""The `ratelimit-sidecar` command: one module a subcommand; parses, prints, calls, nothing else."""

from __future__ import annotations

import importlib

import click

from ratelimit_sidecar import __version__

_MODULES = {
    "serve": "serve",
    "check": "check",
    "demo": "demo",
    "explain": "explain",
    "peers": "peers",
    "reset": "refund",
    "grant": "refund",
    "log-level": "log_level",
}
"""Where a subcommand is, by its name."""


class _LazyGroup(click.Group):
    """Imports a subcommand when it is called: `peers` need not wait a second for all that `serve` consists of.

    As in click's documentation, "Lazily Loading Subcommands".
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, package_name="ratelimit-sidecar")
def main() -> None:
    """A rate limiter for Envoy and Istio that answers from memory and shares its limits between regions."""
