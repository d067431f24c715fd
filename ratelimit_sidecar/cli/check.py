"""`ratelimit-sidecar check`: reads rules and configuration as `serve` would, and reports their problems."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from ratelimit_sidecar.config.errors import ENVIRONMENT, ConfigError, Problem
from ratelimit_sidecar.config.rules_file import find_rules_files, load_rules, unread
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of a check.

    Args:
        files: the number of rules files.
        domains, rules: their number; None if problems keep them from being counted.
    """

    files: int
    domains: int | None
    rules: int | None
    problems: Sequence[Problem]


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
    problem of every file.

    Exits with 0 when all is fine, with 1 when there are problems, with 2 when called wrongly.
    """
    if not paths and config_path is None:
        raise click.UsageError("name files or folders of rules, or a configuration with --config")
    findings = _check(paths, config_path)
    if format_ == "json":
        problems = [{**asdict(problem), "message": problem.message} for problem in findings.problems]
        click.echo(
            json.dumps({"ok": not problems, **asdict(findings), "problems": problems}, ensure_ascii=False, indent=2)
        )
    else:
        for problem in findings.problems:
            click.echo(_annotation(problem) if format_ == "github" else str(problem))
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
    return Findings(len(files), domains, rules, ConfigError(problems).problems if problems else ())


def _summary(findings: Findings) -> str:
    files = _counted(findings.files, "file")
    if findings.problems:
        return f"{_counted(len(findings.problems), 'problem')}; {files} of rules read"
    return f"{files}, {_counted(findings.domains or 0, 'domain')}, {_counted(findings.rules or 0, 'rule')}: no problems"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _annotation(problem: Problem) -> str:
    """As GitHub's workflow commands have it: docs.github.com, "Workflow commands", "Setting an error message"."""
    properties = {
        "file": None if problem.file == ENVIRONMENT else problem.file,
        "line": problem.line,
        "col": problem.column,
        "title": problem.key or None,
    }
    given = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in properties.items() if value is not None)
    return f"::error {given}::{_escaped(problem.message)}"


def _escaped(text: str, also: str = "") -> str:
    for character in "%\r\n" + also:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
