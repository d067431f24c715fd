"""The reference of all options, written from the schema: docs/reference/*.md and the list in `serve --help`.

`python -m ratelimit_sidecar.config.reference [FOLDER]` writes the pages (FOLDER is docs/reference unless given).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic.fields import FieldInfo

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.rules_file import UNRULED_NAME
from ratelimit_sidecar.config.rules_schema import Descriptor, RateLimit, RulesFile
from ratelimit_sidecar.config.sidecar import SidecarConfig
from ratelimit_sidecar.config.structure import (
    FromEnvironment,
    Section,
    ShownDefault,
    expected_of,
    keys_of,
    section_of,
    walk,
)

CONFIGURATION_EXAMPLE = """\
node: {id: us-east-1-a, region: us-east-1}
listen: {grpc: ["0.0.0.0:8081", "unix:/run/ratelimit/rls.sock"], admin: "127.0.0.1:8080", sync: "0.0.0.0:50051"}
rules: [./rules]
sync: {protocol: grpc, peers: [eu-west-2.edge.example.com:50051, ap-southeast-1.edge.example.com:50051]}
bucket: {capacity: 1000, refillRate: 10}
"""

RULES_EXAMPLE = """\
domain: shop
descriptors:
  # Every tenant: 100 a minute, and a bucket of its own.
  - key: tenant
    rate_limit: {unit: minute, requests_per_unit: 100}

  # This tenant: the same rate, and bursts of up to 500.
  - key: tenant
    value: acme
    rate_limit: {unit: minute, requests_per_unit: 100}
    burst: 500
    # Its exports, on top: one in ten seconds, two at once.
    descriptors:
      - key: path
        value: /export
        bucket: {capacity: 2, refillRate: 0.1}

  # Health checks: never limited.
  - key: path
    value: /healthz
    rate_limit: {unlimited: true}
"""

_GENERATED = "<!-- Written by `python -m ratelimit_sidecar.config.reference`; edit the schema, not this page. -->"

_CONFIGURATION_INTRO = """\
`ratelimit-sidecar serve --config sidecar.yaml` reads one YAML file. Every key may be left out, and so may the file. A
key without a value counts as left out. Unknown keys, wrong types and impossible values end the start with exit code 2
and one line for each: `file:line:column: key: what was found, what was expected; the fix`.

Where a key names an environment variable, the variable is the default and the file wins. An empty variable counts as
not set.
"""

_RULES_INTRO = """\
Rules files are envoyproxy/ratelimit's YAML, with a few keys of our own (`algorithm`, `burst`, `bucket`). A sidecar
reads the files and folders that `rules` of its [configuration](configuration.md) lists.
"""

_RULES_MATCHING = """\
## Which rule applies

Envoy sends a domain and descriptors; a descriptor is a list of entries, each a key and a value. The entries are matched
level by level: the first against the descriptors of the domain, the second against those below the one that matched,
and so on.

1. A descriptor with that key and value wins over one with the key alone.
2. A rule applies only when it is as deep as the descriptor has entries: a deeper or shallower match limits nothing.
3. What no rule limits passes, or falls into the `bucket` of the sidecar's configuration where there is one; each such
   descriptor has a bucket of its own, and counts under the rule name `{unruled}`.

In metrics a rule is named by its path, `domain.key_value.key`: `shop.tenant_acme.path_/export` in the example.

## How a limit is enforced

A token bucket holds `burst` requests (without it, `requests_per_unit`) and refills evenly, `requests_per_unit` in each
`unit`. So after a quiet time up to `burst` requests pass at once, and in the long run `requests_per_unit` per unit.
Answers show a `bucket` with its capacity as the limit and without a unit.
"""

_RULES_DIFFERENCES = """\
## Where envoyproxy/ratelimit differs

Not supported yet, and refused rather than ignored:

- {not_yet}
- `*` in a value (wildcards)

Accepted there, refused here, because it is nearly always a slip:

- the same key twice in one mapping (there the last one counts)
- `rate_limit` with neither `requests_per_unit` nor `unlimited` (there it denies all; write `requests_per_unit: 0`)
- `requests_per_unit` or an unknown `unit` beside `unlimited: true`
- a `key` that YAML reads as a number or as true/false, without quotes
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One key a user may set."""

    path: tuple[str, ...]
    takes: str
    default: str
    """As it is written in the file, or in words; "" when the key must be given."""
    variable: FromEnvironment | None
    description: str


def options_of(section: type[Section], at: tuple[str, ...] = ()) -> Iterator[Option]:
    """The options of one section, without those of the sections in it."""
    for key, field in keys_of(section).items():
        if section_of(field) is None:
            yield _option((*at, key), field)


def describe_schema() -> str:
    """Every option of the sidecar's file as plain text at most 80 columns wide, for `serve --help`."""
    paragraphs = []
    for path, field in walk(SidecarConfig):
        if section_of(field) is None:
            option = _option(path, field)
            default = f"Default: {option.default}." if option.default else "Required."
            text = f"{option.description} Takes {option.takes}. {default}".replace("`", "")
            body = textwrap.wrap(text, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
            paragraphs.append("\n".join([_heading_of(option), *body]))
    return "\n".join(paragraphs) + "\n"


def configuration_page() -> str:
    parts = ["# Configuration", _GENERATED, _CONFIGURATION_INTRO.rstrip(), _yaml(CONFIGURATION_EXAMPLE)]
    variables = []
    for key, field in keys_of(SidecarConfig).items():
        below = section_of(field)
        if below is not None:
            parts += [f"## {key}", field.description or "", _table("Key", options_of(below, (key,)))]
            continue
        option = _option((key,), field)
        if option.variable is not None and option.variable.only:
            variables.append(option)
        else:
            parts += [f"## {key}", _table("Key", [option])]
    parts += ["## Environment only", _table("Variable", variables)]
    return "\n\n".join(parts) + "\n"


def rules_page() -> str:
    names = [*sorted(Descriptor.not_yet), *(f"rate_limit.{key}" for key in sorted(RateLimit.not_yet))]
    not_yet = ", ".join(f"`{name}`" for name in names)
    parts = ["# Rules", _GENERATED, _RULES_INTRO.rstrip(), _yaml(RULES_EXAMPLE)]
    parts += ["## The file", _table("Key", options_of(RulesFile))]
    parts += ["## A descriptor", _table("Key", options_of(Descriptor))]
    for key, section in (("rate_limit", RateLimit), ("bucket", BucketConfig)):
        parts += [f"### {key}", keys_of(Descriptor)[key].description or "", _table("Key", options_of(section))]
    parts += [_RULES_MATCHING.format(unruled=UNRULED_NAME).rstrip()]
    parts += [_RULES_DIFFERENCES.format(not_yet=not_yet).rstrip()]
    return "\n\n".join(parts) + "\n"


def pages() -> Mapping[str, str]:
    """The text of each page by its file name."""
    return {"configuration.md": configuration_page(), "rules.md": rules_page()}


def _option(path: tuple[str, ...], field: FieldInfo) -> Option:
    variables = [extra for extra in field.metadata if isinstance(extra, FromEnvironment)]
    return Option(
        path=path,
        takes=expected_of(field),
        default=_default_of(field),
        variable=variables[0] if variables else None,
        description=field.description or "",
    )


def _heading_of(option: Option) -> str:
    key = ".".join(option.path)
    if option.variable is None:
        return key
    return option.variable.variable if option.variable.only else f"{key}  (or {option.variable.variable})"


def _default_of(field: FieldInfo) -> str:
    for extra in field.metadata:
        if isinstance(extra, ShownDefault):
            return extra.text
    if field.is_required():
        return ""
    default = field.default
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return json.dumps(list(default))
    return default if isinstance(default, str) else json.dumps(default)


def _table(what: str, options: Iterable[Option]) -> str:
    rows = [f"| {what} | Takes | Default | What it does |", "|---|---|---|---|"]
    for option in options:
        name, default = ".".join(option.path), option.default or "required"
        if option.variable is not None:
            if option.variable.only:
                name = option.variable.variable
            else:
                default = f"environment `{option.variable.variable}`, else {default}"
        rows.append(f"| `{name}` | {option.takes} | {default} | {option.description} |")
    return "\n".join(rows)


def _yaml(text: str) -> str:
    return f"```yaml\n{text}```"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
