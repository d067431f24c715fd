"""The sidecar's own configuration: one YAML file, two environment variables, and a default for everything.

The models below are the one list of options: validation, `serve --help` and docs/reference/configuration.md come from
them. A value in the file wins over the environment.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ratelimit_sidecar.config.addresses import ListenAddress, PeerAddress, TcpListenAddress
from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.document import Document, load
from ratelimit_sidecar.config.errors import ENVIRONMENT, ConfigError, KeyPath, Problem, dotted, quoted
from ratelimit_sidecar.config.structure import (
    Expected,
    FromEnvironment,
    Section,
    ShownDefault,
    unexpected,
    validate,
    walk,
)
from ratelimit_sidecar.config.yaml_data import YamlMap
from ratelimit_sidecar.limiter.rules import Consistency

DEFAULT_SYNC_ADDRESS = "0.0.0.0:50051"
MAX_NAME_CHARS = 128

_ENGINES = {
    "eventual": Consistency.EVENTUAL,
    "ubos": Consistency.EVENTUAL,
    "local": Consistency.LOCAL,
}


def _at_least_one(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses:
        raise unexpected("at least one address to listen on", "leave the key out for the default")
    return addresses


def _check_name(text: str) -> str:
    if not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable() or " " in text:
        raise ValueError("not a name")
    return text


def _to_path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value and "\0" not in value else value


def _to_consistency(value: object) -> object:
    return _ENGINES.get(value, value) if isinstance(value, str) else value


Name = Annotated[
    str,
    AfterValidator(_check_name),
    Expected(f"a name of 1 to {MAX_NAME_CHARS} printable characters without spaces", of="text"),
]
RulesPath = Annotated[Path, BeforeValidator(_to_path), Expected("the path of a file or folder", of="text")]
Engine = Annotated[
    Consistency,
    BeforeValidator(_to_consistency),
    Expected("eventual (also spelt ubos) or local", choices=tuple(_ENGINES), not_yet=("strict",)),
]


class NodeConfig(Section):
    """Who this sidecar is."""

    id: Annotated[Name, ShownDefault("the host name")] = Field(
        default_factory=socket.gethostname, description="Name of this sidecar; no two in one mesh may share it."
    )
    region: Annotated[Name, FromEnvironment("REGION")] = Field(
        "local", description="Region this sidecar runs in; the `region` label of its metrics."
    )


class ListenConfig(Section):
    """Where this sidecar answers."""

    grpc: Annotated[tuple[ListenAddress, ...], Field(strict=False), AfterValidator(_at_least_one)] = Field(
        ("0.0.0.0:8081",), description="Where Envoy calls the rate limit service; port 0 lets the system pick."
    )
    admin: TcpListenAddress = Field(
        "127.0.0.1:8080", description="HTTP for operators: metrics, health, buckets and peers."
    )
    sync: Annotated[
        TcpListenAddress | None,
        ShownDefault(f"{DEFAULT_SYNC_ADDRESS} when sync.peers is not empty, otherwise not opened"),
    ] = Field(None, description="Where the sidecars of the mesh call.")


class SyncConfig(Section):
    """The mesh of sidecars that share their limits."""

    protocol: Annotated[Literal["grpc"], Expected("grpc", choices=("grpc",))] = Field(
        "grpc", description="How sidecars talk to each other."
    )
    peers: Annotated[tuple[PeerAddress, ...], Field(strict=False)] = Field(
        (), description="The `listen.sync` addresses of the other sidecars; this one itself may be among them."
    )


class SidecarConfig(Section):
    """Everything `ratelimit-sidecar serve` can be told."""

    node: NodeConfig = Field(default_factory=NodeConfig, description="Who this sidecar is.")
    listen: ListenConfig = Field(default_factory=ListenConfig, description="Where this sidecar answers.")
    rules: Annotated[tuple[RulesPath, ...], Field(strict=False)] = Field(
        (),
        description="Rules files, or folders of them (`*.yaml` and `*.yml`, not their subfolders). Relative paths start"
        " at the folder of the configuration file.",
    )
    sync: SyncConfig = Field(default_factory=SyncConfig, description="The mesh of sidecars that share their limits.")
    bucket: BucketConfig | None = Field(
        None, description="A bucket for every descriptor that no rule matches; without it those are not limited."
    )
    engine: Annotated[Engine, FromEnvironment("CRDT_ENGINE", only=True), ShownDefault("eventual")] = Field(
        Consistency.EVENTUAL,
        description="How limits are shared: `eventual` (or `ubos`) over the whole mesh, `local` not at all: each"
        " sidecar has every limit to itself.",
    )

    @model_validator(mode="after")
    def _listen_for_peers(self) -> Self:
        if self.sync.peers and self.listen.sync is None:
            listen = self.listen.model_copy(update={"sync": DEFAULT_SYNC_ADDRESS})
            # Frozen for users, not before they have it.
            object.__setattr__(self, "listen", listen)
        return self


def load_sidecar_config(path: Path | None, environ: Mapping[str, str]) -> SidecarConfig:
    """The configuration in force.

    Args:
        path: the file; None for the defaults and the environment alone.
        environ: as `os.environ`; a variable that is empty counts as not set.

    Returns:
        With the paths of `rules` relative to the working directory, no longer to the file.

    Raises:
        ConfigError: everything that is wrong with the file and the environment.
    """
    document = Document("") if path is None else load(path)
    problems = list(document.problems)
    data = document.data
    variables: dict[str, str] = {}
    if isinstance(data, YamlMap):
        data, misplaced = _without_misplaced_keys(document, data)
        problems += misplaced
        data, variables = _with_environment(document, data, environ)
    config, found = validate(SidecarConfig, data, document)
    problems += [_naming_variable(problem, variables, environ) for problem in found]
    if config is not None and path is not None:
        folder = path.parent
        config = config.model_copy(update={"rules": tuple(folder / rules for rules in config.rules)})
        problems += _contradictions(config, document)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _environment_fields() -> Iterator[tuple[tuple[str, ...], FromEnvironment]]:
    for path, field in walk(SidecarConfig):
        for extra in field.metadata:
            if isinstance(extra, FromEnvironment):
                yield path, extra


def _without_misplaced_keys(
    document: Document, data: Mapping[str, object]
) -> tuple[Mapping[str, object], list[Problem]]:
    """Leave out what only the environment may say."""
    problems = []
    for path, source in _environment_fields():
        if source.only and document.has(path):
            found, fix = f"the key {quoted(dotted(path))}", f"set the environment variable {source.variable} instead"
            problems.append(document.problem(path, found, "it in the environment", fix))
            data = _without(data, path)
    return data, problems


def _with_environment(
    document: Document, data: Mapping[str, object], environ: Mapping[str, str]
) -> tuple[Mapping[str, object], dict[str, str]]:
    """Complete the file's data; also the variables that were used, by dotted key."""
    variables = {}
    for path, source in _environment_fields():
        value = environ.get(source.variable)
        if value and (source.only or not document.has(path)):
            data = _with(data, path, value)
            variables[dotted(path)] = source.variable
    return data, variables


def _with(data: Mapping[str, object], path: Sequence[str], value: object) -> Mapping[str, object]:
    key, *below = path
    if not below:
        return {**data, key: value}
    inner = data.get(key)
    if inner is None:
        inner = {}
    # Something else than a mapping is reported when the file is validated.
    return {**data, key: _with(inner, below, value)} if isinstance(inner, dict) else data


def _without(data: Mapping[str, object], path: Sequence[str]) -> Mapping[str, object]:
    key, *below = path
    if not below:
        return {name: value for name, value in data.items() if name != key}
    inner = data[key]
    assert isinstance(inner, dict), "the document has a value at this path"
    return {**data, key: _without(inner, below)}


def _naming_variable(problem: Problem, variables: Mapping[str, str], environ: Mapping[str, str]) -> Problem:
    """The same problem, said of the environment variable that the value came from."""
    variable = variables.get(problem.key)
    if variable is None:
        return problem
    found = quoted(environ[variable])
    return replace(problem, file=ENVIRONMENT, line=None, column=None, key=variable, found=found)


def _contradictions(config: SidecarConfig, document: Document) -> Iterator[Problem]:
    """What no single value shows."""
    listen = config.listen
    addresses: list[tuple[KeyPath, str]] = [(("listen", "grpc", i), text) for i, text in enumerate(listen.grpc)]
    addresses.append((("listen", "admin"), listen.admin))
    if listen.sync is not None:
        addresses.append((("listen", "sync"), listen.sync))
    yield from _repeated(addresses, document, "listen on an address only once")
    peers: list[tuple[KeyPath, str]] = [(("sync", "peers", i), text) for i, text in enumerate(config.sync.peers)]
    yield from _repeated(peers, document, "list each peer once; is another one missing?")
    for index, path in enumerate(config.rules):
        at, expected = ("rules", index), "a file or folder that can be read"
        try:
            fix = "" if path.exists() else "nothing is there"
        except OSError as error:
            fix = f"{error.strerror}"
        if fix:
            yield document.problem(at, document.describe(at), expected, f"{fix}: {quoted(str(path), None)}")


def _repeated(addresses: Iterable[tuple[KeyPath, str]], document: Document, fix: str) -> Iterator[Problem]:
    first: dict[str, KeyPath] = {}
    for path, text in addresses:
        if text.endswith(":0"):
            continue
        if text in first:
            found = f"{quoted(text)}, which {dotted(first[text])} has already"
            yield document.problem(path, found, "another address", fix)
        first.setdefault(text, path)
