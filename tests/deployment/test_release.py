"""What makes a release: actions that cannot change under us, few rights, and all that the package says it runs on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment import tools
from deployment.cache import Unavailable

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/release.yml"
JOBS: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps() -> Iterator[dict[str, Any]]:
    for job in JOBS.values():
        yield from job["steps"]


def test_every_action_is_pinned_to_a_commit_whose_version_stands_beside_it() -> None:
    lines = [line for line in WORKFLOW.read_text().splitlines() if "uses:" in line]
    assert len(lines) == len([step for step in steps() if "uses" in step])
    for line in lines:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_no_job_may_write_more_than_packages_and_attestations() -> None:
    assert yaml.safe_load(WORKFLOW.read_text())["permissions"] == {"contents": "read"}
    rights = {right for job in JOBS.values() for right, how in job.get("permissions", {}).items() if how == "write"}
    assert rights == {"packages", "id-token", "attestations"}


def test_nothing_that_others_choose_is_pasted_into_a_script() -> None:
    assert [step["run"] for step in steps() if "${{" in step.get("run", "")] == []


def test_nothing_is_published_without_a_tag() -> None:
    for name, job in JOBS.items():
        for step in job["steps"]:
            publishes = re.search(r"publish|login|push |attest", f"{step.get('run', '')} {step.get('uses', '')}")
            if publishes:
                assert "refs/tags/" in step.get("if", job.get("if", "")), f"{name}: {step}"


def test_wheels_are_built_for_every_python_that_the_package_names() -> None:
    named = {of.rpartition(" ")[2] for of in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", of)}
    built = {f"3.{tag[3:-2]}" for tag in PROJECT["tool"]["cibuildwheel"]["build"]}
    assert built == named
    archs = [each["arch"] for each in JOBS["wheels"]["strategy"]["matrix"]["include"]]
    assert archs == PROJECT["tool"]["cibuildwheel"]["linux"]["archs"]


@pytest.mark.deployment
def test_actionlint_has_nothing_to_say() -> None:
    try:
        tools.ensure("actionlint")
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
    ran = subprocess.run([str(tools.path("actionlint")), str(WORKFLOW)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
