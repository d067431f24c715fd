"""Files for configuration tests, and the error lines they give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.rules_tree import RuleDefaults
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config
from ratelimit_sidecar.limiter.rules import Rule, Rules

STANDARD = RuleDefaults()


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
    return path


def sidecar(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> SidecarConfig:
    return load_sidecar_config(write(folder / "sidecar.yaml", text), environ or {})


def rules(
    *paths: Path,
    default_rule: BucketConfig | None = None,
    defaults: RuleDefaults = STANDARD,
    merge_domains: bool = False,
) -> Rules:
    return load_rules(paths, default_rule=default_rule, defaults=defaults, merge_domains=merge_domains)


def rules_of(folder: Path, text: str | bytes, defaults: RuleDefaults = STANDARD) -> Rules:
    return rules(write(folder / "rules.yaml", text), defaults=defaults)


def one_rule(folder: Path, descriptor: str, defaults: RuleDefaults = STANDARD) -> Rule:
    """The only rule of a file with that one descriptor, written as a flow mapping."""
    [rule] = rules_of(folder, f"domain: d\ndescriptors:\n  - {descriptor}\n", defaults)
    return rule


def lines(error: pytest.ExceptionInfo[ConfigError], folder: Path) -> list[str]:
    """The error's lines, with the folder of the test cut off the front."""
    return [line.removeprefix(f"{folder}/") for line in str(error.value).splitlines()]


def sidecar_errors(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        sidecar(folder, text, environ)
    return lines(error, folder)


def rules_errors(folder: Path, text: str | bytes, defaults: RuleDefaults = STANDARD) -> list[str]:
    with pytest.raises(ConfigError) as error:
        rules_of(folder, text, defaults)
    return lines(error, folder)
