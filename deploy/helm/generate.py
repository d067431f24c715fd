"""Copies the alert rules and dashboards of deploy/ into the chart, which can only read files of its own.

python deploy/helm/generate.py: part of `make generate`; a test fails when the copies are stale.
"""

from __future__ import annotations

from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[1]
FILES = DEPLOY / "helm/ratelimit-sidecar/files"
COPIED = {"rules": (DEPLOY / "prometheus/rules", "*.yml"), "dashboards": (DEPLOY / "grafana/dashboards", "*.json")}


def copies() -> dict[Path, bytes]:
    """What the chart's files have to be."""
    return {
        FILES / name / source.name: source.read_bytes()
        for name, (folder, pattern) in COPIED.items()
        for source in sorted(folder.glob(pattern))
    }


def found() -> set[Path]:
    return {path for name in COPIED for path in (FILES / name).glob("*")}


def main() -> None:
    wanted = copies()
    for stale in found() - wanted.keys():
        stale.unlink()
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
