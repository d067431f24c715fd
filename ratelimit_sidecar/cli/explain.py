"""`ratelimit-sidecar explain`: why a request is answered as it is, or which of many requests would have been denied."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import click
from google.protobuf.json_format import Parse, ParseError

from ratelimit_sidecar.cli.descriptor import entries_of
from ratelimit_sidecar.cli.explain_output import explanation_json, explanation_text, replay_json, replay_text
from ratelimit_sidecar.cli.trace_file import FORMAT, BadLine, TraceLine, read_trace
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from ratelimit_sidecar.limiter.explanation import explain as explain_request
from ratelimit_sidecar.limiter.http_mapping import rate_limit_request
from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.replay import Replay
from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.limiter.v1.request_pb2 import Request
from ratelimit_sidecar.server.rpc import RpcError
from ratelimit_sidecar.services.ext_authz import DOMAIN_EXTENSION, http_request

BROKEN_INPUT = 2
MAX_BAD_LINES_SHOWN = 20
_PROGRESS_LINES = 1_000


class _ExplainCommand(click.Command):
    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The format of a trace."""
        formatter.write_paragraph()
        formatter.write_text(FORMAT)


@click.command(cls=_ExplainCommand, short_help="Say why a request is answered as it is, or replay many offline.")
@click.option(
    "--rules",
    "rules_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="PATH",
    help="Rules file, or a folder of them; can be given several times. Without it, those that the configuration names.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="sidecar.yaml, for what holds beside the rules: the default algorithm, answers, the bucket for all else.",
)
@click.option(
    "--trace",
    type=click.File("rb"),
    metavar="FILE",
    help="Replay the requests in this file (- for stdin) and say who would have been denied, in place of one request.",
)
@click.option(
    "--check",
    type=click.File("rb"),
    metavar="FILE",
    help="Explain the request that this file (- for stdin) has as ext_authz's CheckRequest in JSON.",
)
@click.option(
    "--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Output."
)
@click.argument("domain", required=False)
@click.argument("descriptors", nargs=-1, metavar="KEY=VALUE[,KEY=VALUE]...")
def explain(
    *,
    rules_paths: Sequence[Path],
    config_path: Path | None,
    trace: BinaryIO | None,
    check: BinaryIO | None,
    output_format: str,
    domain: str | None,
    descriptors: Sequence[str],
) -> None:
    """Say why a request is answered as it is: level by level what matched, the rule, its bucket, and what a full
    bucket answers. Several descriptors make one request. In a value write \\, for a comma.

    With --trace, requests of the past are replayed with their own times, as if nothing were in shadow mode, and it is
    said who would have been denied: what to look at before enforcement is turned on.

    \b
      ratelimit-sidecar explain --rules rules/ shop plan=gold,user=eve
      ratelimit-sidecar explain --rules rules/ --trace yesterday.jsonl
      ratelimit-sidecar explain --rules rules/ --check request.json

    Exits with 0, or with 2 when the rules, the configuration, the arguments or lines of the trace are broken.
    """
    if trace is None and check is None and (domain is None or not descriptors):
        raise click.UsageError("give a domain and at least one key=value, or --trace or --check")
    if [trace, check, domain].count(None) < 2:
        raise click.UsageError("give one of a request, --trace and --check")
    try:
        rules, settings = _load(rules_paths, config_path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(BROKEN_INPUT)
    if trace is not None:
        _replay(rules, settings, trace, output_format)
        return
    if check is not None:
        try:
            made = _made_of(rules, Parse(check.read(), CheckRequest()))
        except (ParseError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--check: not a CheckRequest in JSON: {error}") from error
        except (RpcError, InvalidRequest) as error:
            raise click.UsageError(f"--check: {error}") from error
        if isinstance(made, str):
            click.echo(json.dumps({"unlimited": made}, ensure_ascii=False) if output_format == "json" else made)
            return
        domain = text_of(made.domain)
        of_request = [
            [(text_of(entry.key), text_of(entry.value)) for entry in descriptor.entries]
            for descriptor in made.descriptors
        ]
    else:
        assert domain is not None
        of_request = [entries_of(text) for text in descriptors]
    try:
        explanation = explain_request(rules, settings, domain, of_request, time.time_ns() // 1_000)
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    if output_format == "json":
        click.echo(json.dumps(explanation_json(explanation), indent=2, ensure_ascii=False))
    else:
        _echo_lines(explanation_text(explanation))


def _load(rules_paths: Sequence[Path], config_path: Path | None) -> tuple[Rules, AnswerSettings]:
    config = load_sidecar_config(config_path, os.environ)
    paths = rules_paths or config.rules
    if not paths:
        raise click.UsageError("no rules: give --rules, or a --config that names some")
    defaults = config.rule_defaults
    if config_path is None:
        # Who shares strict limits is nowhere else, and makes no difference to one request.
        defaults = replace(defaults, has_members=True)
    rules = load_rules(paths, default_rule=config.bucket, defaults=defaults, merge_domains=config.merge_domains)
    return rules, config.settings


def _made_of(rules: Rules, check: CheckRequest) -> Request | str:
    """The rate limit request for a request over ext_authz, or why it is not limited.

    Raises:
        RpcError: it is no request over HTTP.
        InvalidRequest: see `rate_limit_request`.
    """
    http = http_request(check.SerializeToString())
    domain = text_of(http.context_extensions.get(DOMAIN_EXTENSION, b"")) or rules.default_domain
    mapping = rules.http_mappings.get(domain)
    if mapping is None:
        known = ", ".join(sorted(rules.http_mappings)) or "none"
        named = f"the domain {domain!r}" if domain else "no domain, and there is no default one"
        return f"not limited: it names {named}; domains with ext_authz: {known}"
    raw = rate_limit_request(domain, mapping, http)
    if raw is None:
        return f"not limited: it lacks what each descriptor of {domain!r} is made from"
    return Request.FromString(raw)


def _replay(rules: Rules, settings: AnswerSettings, trace: BinaryIO, output_format: str) -> None:
    replay = Replay(rules, settings)
    bad_lines = 0
    for number, outcome in _asked(rules, replay, trace):
        bad_lines += 1
        if bad_lines <= MAX_BAD_LINES_SHOWN:
            click.echo(f"{trace.name}:{number}: {outcome}", err=True)
    if bad_lines > MAX_BAD_LINES_SHOWN:
        click.echo(f"{trace.name}: {bad_lines - MAX_BAD_LINES_SHOWN:,} more broken lines", err=True)
    if output_format == "json":
        click.echo(json.dumps({**replay_json(replay), "broken_lines": bad_lines}, indent=2, ensure_ascii=False))
    else:
        _echo_lines(replay_text(replay))
    if bad_lines:
        sys.exit(BROKEN_INPUT)


def _asked(rules: Rules, replay: Replay, trace: BinaryIO) -> Iterator[tuple[int, Exception | str]]:
    """Replay all lines; yields those that are broken."""
    for line in _with_progress(read_trace(trace), trace):
        recorded = line.recorded
        if isinstance(recorded, BadLine):
            yield line.number, recorded
            continue
        request = recorded.request
        try:
            made = _made_of(rules, request) if isinstance(request, CheckRequest) else request
            for at_us in recorded.times_us():
                if isinstance(made, str):
                    replay.let_pass(at_us)
                else:
                    replay.ask(made, at_us)
        except InvalidRequest as error:
            yield line.number, error
        except RpcError as error:
            yield line.number, error.message


def _with_progress(lines: Iterator[TraceLine], trace: BinaryIO) -> Iterator[TraceLine]:
    """The same lines. Shows the progress on a terminal, if the end is known."""
    if not (sys.stderr.isatty() and trace.seekable()):
        yield from lines
        return
    size_bytes = os.fstat(trace.fileno()).st_size
    with click.progressbar(length=size_bytes, label="replaying", file=sys.stderr) as progress:
        unshown_bytes = 0
        for line in lines:
            yield line
            unshown_bytes += line.size_bytes
            if line.number % _PROGRESS_LINES == 0:
                progress.update(unshown_bytes)
                unshown_bytes = 0
        progress.update(unshown_bytes)


def _echo_lines(lines: Iterator[str]) -> None:
    for line in lines:
        click.echo(line)
