"""Whatever a file holds, loading it ends in a configuration or in a ConfigError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ratelimit_sidecar.config.environment import variables_of
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.rules_schema import Descriptor, RateLimit, Replaces, RulesFile
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config
from ratelimit_sidecar.config.structure import keys_of, walk

KEYS = sorted(
    {key for path, _ in walk(SidecarConfig) for key in path}
    | {key for section in (RulesFile, Descriptor, RateLimit, Replaces) for key in keys_of(section)}
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["minute", "a:1", "unix:/a", "*", "\0", "\x1b[2J", "grpc", "token_bucket", "fixed_window", "1e999", "🦞"]
    )
)
keys = st.sampled_from(KEYS) | st.text(max_size=4)
structures = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=30,
)
any_file = settings(
    max_examples=3 * settings().max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load_both(raw: bytes) -> None:
    file = Path("input.yaml")
    file.write_bytes(raw)
    for load in (
        lambda: load_sidecar_config(file, {}),
        lambda: load_rules([file]),
    ):
        lines = error_lines(load)
        assert all(line.isprintable() for line in lines)


def error_lines(load: Callable[[], object]) -> list[str]:
    """What the ConfigError says, one line a problem; nothing when there is none."""
    try:
        load()
    except ConfigError as error:
        assert 0 < len(error.problems) == len(str(error).split("\n"))  # noqa: PT017 - either outcome is fine
        return str(error).split("\n")
    return []


@any_file
@given(structures)
@example({"domain": "d", "descriptors": [{"key": "a", "value": "\ud800"}]})
@example({"bucket": {"capacity": 1, "refillRate": 1e-300}})
@example({"rules": ["a" * 5000]})
@example({"domain": "d", "descriptors": [{"key": "a", "rate_limit": {"replaces": [[[{"name": 1}]]]}}]})
@example({"domain": "d", "descriptors": [{"key": "a", "metadata": {"x": 1e308}}]})
@example({"xds": {"tls": {"key": "\0"}, "headers": {"a": 1}, "node_metadata": {"": ""}}})
@example({"answers": {"response_headers": {"limit": "a\n"}, "near_limit_ratio": True}})
def test_any_structure_is_accepted_or_refused_cleanly(data: object) -> None:
    # JSON is YAML; NaN and the infinities become plain text.
    load_both(json.dumps(data).encode())


@any_file
@given(
    st.lists(
        st.sampled_from([*KEYS, *"[]{},:-?&*!|>'\"%@`#\n\t 01a.~", "\n  ", ": ", "- ", "<<: ", "&a ", "*a", "---\n"]),
        max_size=40,
    )
)
def test_any_mix_of_yaml_syntax_is_accepted_or_refused_cleanly(pieces: list[str]) -> None:
    load_both("".join(pieces).encode())


@any_file
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_accepted_or_refused_cleanly(raw: bytes) -> None:
    load_both(raw)


@any_file
@given(
    st.dictionaries(
        st.sampled_from(sorted({variable for variable, _ in variables_of(SidecarConfig)})),
        st.text(max_size=8)
        | st.sampled_from(
            ["true", "0", "3s", "1.5h", "a:b", "a=b,", "GRPC_XDS_SOTW", "8080", "/", "local", "0.8", "-1"]
        ),
        max_size=6,
    )
)
def test_any_environment_is_accepted_or_refused_cleanly(environ: dict[str, str]) -> None:
    assert all(line.isprintable() for line in error_lines(lambda: load_sidecar_config(None, environ)))
