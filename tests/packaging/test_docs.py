"""Documents lead to what is there: files, headings, and pages that the sources name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ratelimit_sidecar.server.rpc import Code
from ratelimit_sidecar.telemetry.metrics import METRICS

ROOT = Path(__file__).parents[2]
SOURCES = ("ratelimit_sidecar", "tests", "benchmarks", "deploy", "dev", "envoy", "examples", "proto")
SUFFIXES = {".py", ".pyx", ".yaml", ".yml", ".tf", ".proto"}
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "third_party/*/README.md")
    for page in ROOT.glob(pattern)
)


def headings_of(page: Path) -> set[str]:
    """Its anchors, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings_of(target), link


def test_every_page_that_something_names_is_there() -> None:
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    named = {
        (file.name, page)
        for file in [*files, *PAGES, ROOT / "Makefile"]
        for page in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text())
    }
    assert named
    assert [(name, page) for name, page in named if not (ROOT / page).exists()] == []


def test_the_index_lists_every_page() -> None:
    docs = ROOT / "docs"
    listed = {(docs / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", (docs / "README.md").read_text())}
    assert {page for page in docs.rglob("*.md") if page.name != "README.md"} - listed == set()


def test_a_kind_of_hostile_request_names_tests_that_are_there_and_no_status_is_missing() -> None:
    page = (ROOT / "docs" / "reference" / "hostile-requests.md").read_text()
    tests = re.findall(r"`([a-z0-9]+(?:/test_\w+\.py)?)`(?=[^|]*\|$)", page, re.MULTILINE)
    assert len(tests) >= 15
    assert [name for name in tests if not (ROOT / "tests" / name).exists()] == []
    statuses = set(re.findall(r"[A-Z_]{5,}", " ".join(re.findall(r"^\| ([A-Z_, ]+) \|", page, re.MULTILINE))))
    elsewhere = {"OK", "NOT_FOUND", "PERMISSION_DENIED"}  # of health checks, reflection and a denial by ext_authz
    assert statuses == {code.name for code in Code} - elsewhere


FAILURES = (ROOT / "docs" / "reference" / "failures.md").read_text()
PROMISES = (ROOT / "docs" / "reference" / "promises.md").read_text()


def test_failures_and_promises_name_tests_that_are_there() -> None:
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", FAILURES + PROMISES))
    assert len(named) >= 45
    assert named - there == set()
    files = re.findall(r"`(tests/[\w/]+\.py)`", PROMISES)
    assert len(files) >= 8
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_a_failure_names_logs_and_metrics_that_are_there() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "ratelimit_sidecar").rglob("*.py"))
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?:`|\{)", FAILURES))
    metrics = {name for name in named if name.startswith(("ratelimit_", "crdt_"))}
    assert metrics - {metric.name for metric in METRICS} == set()
    events = {name for name in named - metrics if not name.startswith("test_")}
    assert len(events) >= 8
    assert {event for event in events if f'"{event}"' not in sources} == set()
