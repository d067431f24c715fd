"""The Helm chart, rendered by the real Helm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml

from deployment import tools
from deployment.engine import ROOT

CHART: Final = ROOT / "deploy/helm/ratelimit-sidecar"
RELEASE: Final = "rl"
FULLNAME: Final = "rl-ratelimit-sidecar"
VALUES: Final = sorted((CHART / "ci").glob("*.yaml"))
OLD_KUBERNETES: Final = "1.34"
"""The last that does not copy the region from a node to its pods."""

Object = dict[str, Any]
Values = dict[str, Any]


class Refused(Exception):
    """What Helm said."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a chart was rendered to.

    Args:
        text: as `kubectl apply` takes it.
    """

    text: str

    @property
    def objects(self) -> list[Object]:
        return [each for each in yaml.safe_load_all(self.text) if each is not None]

    def of_kind(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str) -> Object:
        (found,) = self.of_kind(kind)
        return found

    @property
    def sidecar_config(self) -> str:
        return str(
            next(each for each in self.of_kind("ConfigMap") if "sidecar.yaml" in each["data"])["data"]["sidecar.yaml"]
        )


def render(
    *files: Path, values: Values | None = None, kubernetes: str = tools.KUBERNETES, chart: Path = CHART
) -> Rendered:
    """Render a chart as Helm does, with values from files.

    Args:
        values: on top of the files'.
        kubernetes: the version that the cluster says it has.

    Raises:
        Unavailable: there is no Helm in the cache.
        Refused: the chart does not take these values.
    """
    with _values_options(files, values or {}) as options:
        return Rendered(helm("template", RELEASE, str(chart), "--kube-version", kubernetes, *options))


def lint(*files: Path) -> None:
    """Let Helm check the chart with values from files.

    Raises:
        Refused: Helm found something.
    """
    with _values_options(files, {}) as options:
        helm("lint", "--strict", str(CHART), *options)


def helm(*arguments: str) -> str:
    """Run Helm, and return what it prints.

    Raises:
        Unavailable: there is no Helm in the cache.
        Refused: it failed.
    """
    command = [str(tools.path("helm")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise Refused(done.stderr)
    return done.stdout


@contextmanager
def _values_options(files: Sequence[Path], values: Values) -> Iterator[list[str]]:
    with TemporaryDirectory() as folder:
        more = Path(folder) / "values.json"
        more.write_text(json.dumps(values))
        yield [f"--values={each}" for each in (*files, more)]
