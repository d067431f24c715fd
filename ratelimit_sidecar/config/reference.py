"""The reference of all options, written from the schema: pages in docs, and the list in `serve --help`.

`python -m ratelimit_sidecar.config.reference [FOLDER]` writes the pages (FOLDER is docs unless given).
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
from ratelimit_sidecar.config.migration import migration_page, reference_page
from ratelimit_sidecar.config.rules_file import DEFAULT_RULE_NAME
from ratelimit_sidecar.config.rules_schema import AuthzEntry, Descriptor, ExtAuthz, RateLimit, RulesFile
from ratelimit_sidecar.config.sidecar_schema import SidecarConfig
from ratelimit_sidecar.config.structure import (
    FromEnvironment,
    Section,
    ShownDefault,
    environment_of,
    expected_of,
    is_list,
    keys_of,
    section_of,
)

CONFIGURATION_EXAMPLE = """\
node: {id: us-east-1-a, region: us-east-1}
listen: {grpc: ["0.0.0.0:8081", "unix:/run/ratelimit/rls.sock"], admin: "127.0.0.1:8080", sync: "0.0.0.0:50051"}
rules: [./rules]
sync:
  protocol: grpc
  peers: [eu-west-2.edge.example.com:50051, ap-southeast-1.edge.example.com:50051]
  tls: {certificate: tls/tls.crt, key: tls/tls.key, ca: tls/ca.crt, peer_names: "{node}.edge.example.com"}
  # For strict limits: who shares them.
  members: {us-east-1-a: 2, eu-west-2-a: 1, ap-southeast-1-a: 1}
bucket: {capacity: 1000, refillRate: 10}
answers: {response_headers: {enabled: true}}
"""

RULES_EXAMPLE = """\
domain: shop
descriptors:
  # Every tenant: 100 a minute, and a bucket of its own.
  - key: tenant
    rate_limit: {unit: minute, requests_per_unit: 100, name: tenant}

  # This tenant: the same rate, and bursts of up to 500.
  - key: tenant
    value: acme
    rate_limit: {unit: minute, requests_per_unit: 100, name: acme}
    burst: 500
    # Its exports, on top: one in ten seconds, two at once.
    descriptors:
      - key: path
        value: /export
        bucket: {capacity: 2, refillRate: 0.1}

  # All trial tenants together: 1,000 in a day by the clock, and callers are told when to come back.
  - key: tenant
    value: trial-*
    share_threshold: true
    algorithm: fixed_window
    rate_limit: {unit: day, requests_per_unit: 1000}
    retry_after: true
    body: "The trial is over for today."

  # Tokens of a language model, reported when they are spent: charged although over, into debt.
  - key: tokens_of
    rate_limit: {unit: hour, requests_per_unit: 200000}
    charge: always

  # A campaign: 500 an hour, whatever else limits the tenant. Not enforced yet.
  - key: campaign
    value: summer
    rate_limit: {unit: hour, requests_per_unit: 500, replaces: [{name: tenant}, {name: acme}]}
    shadow_mode: true

  # Health checks: never limited.
  - key: path
    value: /healthz
    rate_limit: {unlimited: true}
"""

_GENERATED = "<!-- Written by `python -m ratelimit_sidecar.config.reference` from %s: edit there. -->"
_OF_CONFIGURATION = _GENERATED % "`config/sidecar_schema.py`"
_OF_RULES = _GENERATED % "`config/rules_schema.py`"
_OF_MIGRATION = _GENERATED % "`config/migration.py` and `config/differences.py`"

_CONFIGURATION_INTRO = """\
`ratelimit-sidecar serve --config sidecar.yaml` reads one YAML file. Every key may be left out, and so may the file.
Errors end the start with exit code 2 and one line for each: `file:line:column: key: what was found, what was expected;
the fix`. `ratelimit-sidecar check --config sidecar.yaml` says the same beforehand, also of the rules.

A variable named under "Default" is read where the file does not have the key; an empty one counts as not set. Those of
envoyproxy/ratelimit are [all listed here](envoyproxy-ratelimit.md).
"""

_ENVIRONMENT_ONLY = """\
Logs go to stderr by `LOG_LEVEL` (debug, info, warn or error; info by default) and `LOG_FORMAT` (text or json), traces
by the [`OTEL_*` variables](otel.md).

`http_proxy`, `https_proxy` and `grpc_proxy` hold for an xDS server and a collector, except for what `no_proxy` names
and for loopback; the log names each connection through a proxy (`through_proxy`). Peers are dialled directly.
"""

_RULES_INTRO = """\
Rules files are envoyproxy/ratelimit's YAML ([what is read
otherwise](envoyproxy-ratelimit.md#rules-files-that-are-read-otherwise)), with keys of our own: `algorithm`, `burst`,
`bucket`, `consistency`, `max_debt`, `wait`, `charge`, `retry_after`, `body`, `ext_authz`. `rules` of the
[configuration](configuration.md) lists them. `ratelimit-sidecar check PATH...` says what is wrong with them.
"""

_RULES_EXT_AUTHZ = """\
Envoy's ext_authz filter sends the request in place of descriptors. `ext_authz` says which descriptors it has; they are
matched and charged as those of the rate limit filter, on the same buckets ([which filter?](../which-filter.md)).

```yaml
domain: shop
ext_authz:
  default: true
  descriptors:
    - entries: [{key: user, from: header, name: x-user-id}]
    - entries: [{key: method, from: method}, {key: path, from: path}]
descriptors:
  - {key: user, rate_limit: {unit: minute, requests_per_unit: 100}}
  - key: method
    value: POST
    descriptors: [{key: path, value: /orders, rate_limit: {unit: minute, requests_per_unit: 10}}]
```

The domain is the context extension `domain`; over HTTP it stands in the `path_prefix`, `/ext_authz/shop`. Requests
without one, over HTTP those with the prefix `/ext_authz/`, are for the domain with `default: true`. A request passes
when its domain has no `ext_authz`, when it lacks what each of the descriptors is made from, or when no rule limits it;
over HTTP one for a domain that no rules have is denied with 404. Rules from an xDS server have no `ext_authz`.

Over HTTP, for what has no gRPC: `listen.ext_authz_http` is a port [without
TLS](../threat-model.md#whoever-reaches-listenext_authz_http), with [bounds](bounds.md#clients). A `path_prefix`
other than `/ext_authz/` is denied with 404, an error with 503. There are headers, path and method only;
`authorization_request.headers_to_add` sends more. **With `failure_mode_allow` have no route for `CONNECT`**: it passes
whatever the answer.
"""

_RULES_MATCHING = """\
## Which rule applies

Envoy sends a domain and descriptors, each a list of entries with key and value. The first entry is matched against the
descriptors of the domain, the second against those below the one that matched, and so on.

1. A descriptor with that key and value wins; then the first in the file whose value has a `*` and fits; then the one
   with the key alone.
2. A rule applies only when it is as deep as the descriptor has entries: a deeper or shallower match limits nothing.
3. What no rule limits passes. With `bucket` in the sidecar's configuration each such descriptor has a bucket of its
   own, under the rule name `{default_rule}`.
4. A descriptor that brings a limit of its own is held to that one, in any domain that has rules. It is counted with the
   descriptor's rule if that counts in windows of the same unit, otherwise in a sliding window, or as `algorithm` of the
   sidecar's configuration says.
5. Of the rules that a request meets, those that another one `replaces` do not count, also if that one is in
   shadow mode; of two that replace each other neither does. `ratelimit-sidecar check` warns of such
   entries, and of names that no limit has.

In metrics a rule is named by its path, `domain.key_value.key`: `shop.tenant_acme.path_/export` in the example, and
`shop.tenant_trial-*` for all trials. `value_to_metric` puts the value of the request there, `detailed_metric` all of
them; a value behind `share_threshold` is always named by its pattern.

## How a limit is enforced

- A `token_bucket` holds `burst` requests (without it, `requests_per_unit`) and refills evenly, `requests_per_unit` in
  each `unit`. Answers show a `bucket` with its capacity as the limit and without a unit.
- A `fixed_window` lets `requests_per_unit` pass between two full units of the clock, in UTC. Denied requests count too,
  as in envoyproxy/ratelimit.
- A `sliding_window` lets `requests_per_unit` pass in any time as long as the unit.

A request is denied when one of the limits it meets is over that is not in `quota_mode`, or when all that are in
`quota_mode` are, of which there must be some. A limit in `shadow_mode` never counts as over.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One key a user may set."""

    path: tuple[str, ...]
    takes: str
    default: str
    """As it is written in the file, or in words; "" when the key must be given."""
    variables: FromEnvironment | None
    description: str


def options_of(section: type[Section], at: tuple[str, ...] = ()) -> Iterator[Option]:
    """The options of one section, and of those in it that have a variable which brings them."""
    for key, field in keys_of(section).items():
        if section_of(field) is None or environment_of(field) is not None:
            yield _option((*at, key), field)


def all_options(section: type[Section], at: tuple[str, ...] = ()) -> Iterator[Option]:
    """The options of a section and of all those below it; a list of sections is one."""
    for key, field in keys_of(section).items():
        below = None if is_list(field) else section_of(field)
        if below is None or environment_of(field) is not None:
            yield _option((*at, key), field)
        if below is not None:
            yield from all_options(below, (*at, key))


def describe_schema() -> str:
    """Every option of the sidecar's file as plain text at most 80 columns wide, for `serve --help`."""
    paragraphs = []
    for option in all_options(SidecarConfig):
        default = f"Default: {option.default}." if option.default else "Required."
        text = f"{option.description} Takes {option.takes}. {default}".replace("`", "")
        body = textwrap.wrap(text, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        paragraphs.append("\n".join([*_heading_of(option), *body]))
    return "\n".join(paragraphs) + "\n"


def configuration_page() -> str:
    parts = ["# Configuration", _OF_CONFIGURATION, _CONFIGURATION_INTRO.rstrip(), _yaml(CONFIGURATION_EXAMPLE)]
    variables, simple = [], []
    for key, field in keys_of(SidecarConfig).items():
        below, source = section_of(field), environment_of(field)
        own = [_option((key,), field)] if below is None or source is not None else []
        if below is not None:
            options = [*own, *all_options(below, (key,))]
            # An option of its own tells the same in its row.
            description = [] if own else [field.description or ""]
            parts += [f"## {key}", *description, _table("Key", options)]
        elif source is not None and source.only:
            variables += own
        else:
            simple += own
    parts += ["## Other keys", _table("Key", simple)]
    parts += ["## Environment only", _table("Variable", variables), _ENVIRONMENT_ONLY.rstrip()]
    return "\n\n".join(parts) + "\n"


def rules_page() -> str:
    parts = ["# Rules", _OF_RULES, _RULES_INTRO.rstrip(), _yaml(RULES_EXAMPLE)]
    parts += ["## The file", _table("Key", options_of(RulesFile))]
    parts += ["## A descriptor", _table("Key", options_of(Descriptor))]
    for key, section in (("rate_limit", RateLimit), ("bucket", BucketConfig)):
        parts += [f"### {key}", keys_of(Descriptor)[key].description or "", _table("Key", all_options(section))]
    parts += ["## ext_authz", _RULES_EXT_AUTHZ.rstrip(), _table("Key", options_of(ExtAuthz))]
    parts += [
        "Each of `descriptors` has `entries`, a list, each with these keys:",
        _table("Key", options_of(AuthzEntry)),
    ]
    parts.append(_RULES_MATCHING.format(default_rule=DEFAULT_RULE_NAME).rstrip())
    return "\n\n".join(parts) + "\n"


def pages() -> Mapping[str, str]:
    """The text of each page by its path in docs."""
    return {
        "reference/configuration.md": configuration_page(),
        "reference/rules.md": rules_page(),
        "reference/envoyproxy-ratelimit.md": reference_page(_OF_MIGRATION),
        "migration-from-envoyproxy-ratelimit.md": migration_page(_OF_MIGRATION),
    }


def _option(path: tuple[str, ...], field: FieldInfo) -> Option:
    return Option(
        path=path,
        takes=expected_of(field),
        default=_default_of(field),
        variables=environment_of(field),
        description=field.description or "",
    )


def _heading_of(option: Option) -> list[str]:
    key = ".".join(option.path)
    if option.variables is None:
        return [key]
    if option.variables.only:
        return [option.variables.names]
    return textwrap.wrap(f"{key}  (or {option.variables.names})", 80, subsequent_indent="  ")


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
        if option.variables is not None:
            if option.variables.only:
                name = option.variables.names
            else:
                names = ", ".join(f"`{variable}`" for variable in option.variables.variables)
                default = f"{names}, else {default}"
        rows.append(f"| `{name}` | {option.takes} | {default} | {option.description} |")
    return "\n".join(rows)


def _yaml(text: str) -> str:
    return f"```yaml\n{text}```"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, text in pages().items():
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
