"""`ratelimit-sidecar serve`: runs the sidecar."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click
import structlog
import uvloop

from ratelimit_sidecar.app import FrontEndKind, Sidecar
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.proxies import spare_loopback
from ratelimit_sidecar.config.reference import describe_schema
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config
from ratelimit_sidecar.persistence.snapshot_file import StateError
from ratelimit_sidecar.server.listeners import ListenError
from ratelimit_sidecar.telemetry.export import TracingError
from ratelimit_sidecar.telemetry.log_writer import STDERR, LogWriter, TakenStderr
from ratelimit_sidecar.telemetry.logs import FORMATS, configure_logs

BAD_CONFIGURATION = 2
FAILED = 1


class _ServeCommand(click.Command):
    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Log wrong arguments like other errors, since programs read the log."""
        try:
            return super().make_context(*args, **extra)
        except click.UsageError as error:
            if FORMATS.get(os.environ.get("LOG_FORMAT", "").lower()) != "json":
                raise
            configure_logs(os.environ, LogWriter(STDERR))
            _tell(error.format_message())
            sys.exit(BAD_CONFIGURATION)

    def format_epilog(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the list of options unchanged; click would wrap its lines."""
        formatter.write_paragraph()
        formatter.write(describe_schema())


@click.command(
    cls=_ServeCommand, short_help="Answer Envoy, and share what is admitted with the sidecars of other regions."
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file with the keys listed below. Without it, the defaults.",
)
@click.option(
    "--frontend",
    type=click.Choice([kind.value for kind in FrontEndKind]),
    default=FrontEndKind.H2.value,
    show_default=True,
    help="What carries Envoy's calls: h2 (many times faster) or grpcio (grpc.aio, to compare with; has fewer bounds).",
)
def serve(config_path: Path | None, frontend: str) -> None:
    """Answer Envoy's rate limit service calls from memory, and stream what is admitted to the sidecars elsewhere.

    With no file and no flags it listens for Envoy on port 8081 and for operators on 127.0.0.1:8080, and limits nothing
    unless there are rules in /srv/runtime_data/current/config.
    SIGTERM and SIGINT drain: calls in flight are answered, peers are told what was admitted, and it exits with 0.
    Exits with 2 when the configuration is broken, with 1 when an address or the file of
    its state is taken.
    """
    if os.getpid() == 1:
        # The kernel keeps from the first process of a container what it has no handler for. Once it runs, it has one.
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    stderr = TakenStderr()
    log = LogWriter(stderr.log)
    code = _run_until_stopped(config_path, FrontEndKind(frontend), log, stderr)
    stderr.close()
    log.flush()
    # Not sys.exit: a thread of gRPC that wakes up while Python finalizes aborts the process (grpc/grpc issue 22365). So
    # a clean stop could end with 134.
    os._exit(code)


def _run_until_stopped(config_path: Path | None, front_end: FrontEndKind, log: LogWriter, stderr: TakenStderr) -> int:
    """Run the sidecar; returns the exit code. The reason for another code than 0 is logged."""
    try:
        try:
            configure_logs(os.environ, log, colors=os.isatty(stderr.log))
        finally:
            stderr.start()
        spare_loopback(os.environ)
        config = load_sidecar_config(config_path, os.environ)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config, front_end, log))
    except (ConfigError, TracingError, ValueError) as error:
        _tell(str(error))
        return BAD_CONFIGURATION
    except (ListenError, StateError) as error:
        _tell(str(error))
        return FAILED
    except Exception:
        _tell(traceback.format_exc())
        return FAILED
    return 0


def _tell(why: str) -> None:
    """Log why the process ends."""
    structlog.stdlib.get_logger(__name__).critical("failed", why=why.rstrip())


async def _run(config: SidecarConfig, front_end: FrontEndKind, log: LogWriter) -> None:
    await Sidecar(config, front_end, log).run()
