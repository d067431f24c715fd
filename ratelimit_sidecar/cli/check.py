"""`ratelimit-sidecar check`: reads rules and configuration as `serve` would, and reports their problems."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from ratelimit_sidecar.config.document import load
from ratelimit_sidecar.config.errors import ENVIRONMENT, ConfigError, Problem, in_order
from ratelimit_sidecar.config.replaced_limits import doubtful_replaces
from ratelimit_sidecar.config.rules_file import find_rules_files, load_rules, unread
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of a check.

    Args:
        files: the number of rules files.
        domains, rules: their number; None if problems keep them from being counted.
        warnings: what is allowed, and probably not meant; looked for only if there are no problems.
    """

    files: int
    domains: int | None
    rules: int | None
    problems: Sequence[Problem]
    warnings: Sequence[Problem] = ()


@click.command(short_help="Say what is wrong with rules and configuration, without starting.")
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path), metavar="[PATH]...")
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Check this configuration of a sidecar too, and the rules it names.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "github"]),
    default="text",
    show_default=True,
    help="One line a problem; one JSON object; or annotations for a workflow of GitHub Actions.",
)
def check(paths: Sequence[Path], config_path: Path | None, format_: str) -> None:
    """Read rules files and folders of them as `serve` would, with the same environment variables, and report every
    problem of every file. Without problems, warn of `replaces` that do nothing, or take a limit away for none.

    Exits with 0 when there are no problems, with 1 when there are problems, with 2 when called wrongly.
    """
    if not paths and config_path is None:
        raise click.UsageError("name files or folders of rules, or a configuration with --config")
    findings = _check(paths, config_path)
    if format_ == "json":
        problems, warnings = (
            [{**asdict(problem), "message": problem.message} for problem in found]
            for found in (findings.problems, findings.warnings)
        )
        body = {"ok": not problems, **asdict(findings), "problems": problems, "warnings": warnings}
        click.echo(json.dumps(body, ensure_ascii=False, indent=2))
    else:
        for problem in findings.problems:
            click.echo(_annotation("error", problem) if format_ == "github" else str(problem))
        for warning in findings.warnings:
            click.echo(_annotation("warning", warning) if format_ == "github" else f"warning: {warning}")
        click.echo(_summary(findings))
    sys.exit(1 if findings.problems else 0)


def _check(paths: Sequence[Path], config_path: Path | None) -> Findings:
    problems: list[Problem] = []
    config, merge_domains, has_members = SidecarConfig(), True, True
    try:
        config = load_sidecar_config(config_path, os.environ)
        merge_domains = config.merge_domains
        has_members = config_path is None or config.rule_defaults.has_members
    except ConfigError as error:
        # What it would have said of rules is unknown: they are blamed only for what is wrong in any case.
        problems += error.problems
    defaults = replace(config.rule_defaults, has_members=has_members)
    rules_paths = [*paths, *(config.rules if config_path is not None else ())]
    files, _ = find_rules_files(rules_paths)
    for path in paths:
        problems += unread(path, rules_paths)
    domains = rules = None
    try:
        loaded = load_rules(rules_paths, defaults=defaults, merge_domains=merge_domains)
        domains, rules = len(loaded.domains), sum(1 for _ in loaded)
    except ConfigError as error:
        problems += error.problems
    warnings = () if problems else doubtful_replaces(map(load, files))
    return Findings(len(files), domains, rules, in_order(problems), in_order(warnings))


def _summary(findings: Findings) -> str:
    files = _counted(findings.files, "file")
    if findings.problems:
        return f"{_counted(len(findings.problems), 'problem')}; {files} of rules read"
    warned = f", {_counted(len(findings.warnings), 'warning')}" if findings.warnings else ""
    domains, rules = _counted(findings.domains or 0, "domain"), _counted(findings.rules or 0, "rule")
    return f"{files}, {domains}, {rules}: no problems{warned}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _annotation(level: str, problem: Problem) -> str:
    """As GitHub's workflow commands have it: docs.github.com, "Workflow commands", "Setting an error message"."""
    properties = {
        "file": None if problem.file == ENVIRONMENT else problem.file,
        "line": problem.line,
        "col": problem.column,
        "title": problem.key or None,
    }
    given = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in properties.items() if value is not None)
    return f"::{level} {given}::{_escaped(problem.message)}"


def _escaped(text: str, also: str = "") -> str:
    for character in "%\r\n" + also:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
