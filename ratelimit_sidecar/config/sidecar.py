"""The sidecar's own configuration, read from one YAML file and the environment, and checked as a whole.

A value in the file wins over the environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from ratelimit_sidecar.config.addresses import is_loopback
from ratelimit_sidecar.config.document import Document, load
from ratelimit_sidecar.config.environment import Completed, complete
from ratelimit_sidecar.config.errors import ENVIRONMENT, ConfigError, KeyPath, Problem, dotted, quoted
from ratelimit_sidecar.config.rules_file import unread
from ratelimit_sidecar.config.rules_schema import BUCKET_ALGORITHM
from ratelimit_sidecar.config.runtime import default_folder
from ratelimit_sidecar.config.sidecar_schema import (
    FabricConfig,
    ListenTlsConfig,
    NodeConfig,
    PersistenceConfig,
    RedisTlsConfig,
    SidecarConfig,
    SyncTlsConfig,
    XdsTlsConfig,
)
from ratelimit_sidecar.config.structure import validate
from ratelimit_sidecar.config.tls_files import TlsPaths, read_checked
from ratelimit_sidecar.config.yaml_data import YamlMap
from ratelimit_sidecar.limiter.rules import Consistency

__all__ = ["SidecarConfig", "load_sidecar_config"]


def load_sidecar_config(path: Path | None, environ: Mapping[str, str]) -> SidecarConfig:
    """Load the configuration.

    Args:
        path: the file; None for the defaults and the environment alone.
        environ: as `os.environ`; an empty variable counts as not set.

    Returns:
        The configuration, with paths relative to the working directory instead of the file.

    Raises:
        ConfigError: all problems of the file and the environment.
    """
    document = Document(ENVIRONMENT, origin=None) if path is None else load(path)
    data = document.data
    completed = Completed({}, {}, ())
    if isinstance(data, YamlMap):
        completed = complete(SidecarConfig, document, data, environ)
        data = completed.data
    problems = [*document.problems, *completed.problems]
    config, found = validate(SidecarConfig, data, document)
    if config is not None:
        config = _with_paths(config, completed, Path() if path is None else path.parent)
        if config.xds is None and not document.has(("rules",)) and "rules" not in completed.variables:
            folder = default_folder(environ)
            config = config if folder is None else config.model_copy(update={"rules": (folder,)})
        found = list(_contradictions(config, document, completed))
    problems += [completed.naming_variables(problem) for problem in found]
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _with_paths(config: SidecarConfig, completed: Completed, folder: Path) -> SidecarConfig:
    """Make paths in the file relative to `folder`. With xds drop the rules of a runtime folder, as envoyproxy/ratelimit
    does.
    """
    rules, xds = config.rules, config.xds
    if "rules" in completed.variables:
        rules = () if xds is not None else rules
    else:
        rules = tuple(folder / path for path in rules)
    sync = config.sync
    if sync.tls is not None:
        sync = sync.model_copy(update={"tls": _with_tls_paths(sync.tls, "sync.tls", completed, folder)})
    if xds is not None and xds.tls is not None:
        xds = xds.model_copy(update={"tls": _with_tls_paths(xds.tls, "xds.tls", completed, folder)})
    listen = config.listen
    if listen.tls is not None:
        listen = listen.model_copy(update={"tls": _with_tls_paths(listen.tls, "listen.tls", completed, folder)})
    if listen.admin_token_file is not None:
        listen = listen.model_copy(update={"admin_token_file": folder / listen.admin_token_file})
    persistence = config.persistence
    if persistence is not None:
        files = {"file": persistence.file, "password_file": persistence.password_file}
        if persistence.tls is not None:
            persistence = persistence.model_copy(
                update={"tls": _with_tls_paths(persistence.tls, "persistence.tls", completed, folder)}
            )
        persistence = persistence.model_copy(
            update={name: folder / path for name, path in files.items() if path is not None}
        )
    fabric = config.fabric
    if fabric is not None:
        if fabric.tls is not None:
            fabric = fabric.model_copy(update={"tls": _with_tls_paths(fabric.tls, "fabric.tls", completed, folder)})
        if fabric.password_file is not None:
            fabric = fabric.model_copy(update={"password_file": folder / fabric.password_file})
    update = {"rules": rules, "xds": xds, "sync": sync, "listen": listen, "persistence": persistence, "fabric": fabric}
    return config.model_copy(update=update)


T = TypeVar("T", SyncTlsConfig, XdsTlsConfig, ListenTlsConfig, RedisTlsConfig)


def _with_tls_paths(tls: T, at: str, completed: Completed, folder: Path) -> T:
    files = {"certificate": tls.certificate, "key": tls.key, "ca": tls.ca}
    given = {
        name: path if f"{at}.{name}" in completed.variables else folder / path
        for name, path in files.items()
        if path is not None
    }
    return tls.model_copy(update=given)


def _contradictions(config: SidecarConfig, document: Document, completed: Completed) -> Iterator[Problem]:
    """Problems that come from several values together."""
    listen = config.listen
    addresses: list[tuple[KeyPath, str]] = [(("listen", "grpc", i), text) for i, text in enumerate(listen.grpc)]
    addresses.append((("listen", "admin"), listen.admin))
    if listen.ext_authz_http is not None:
        addresses.append((("listen", "ext_authz_http"), listen.ext_authz_http))
    if listen.admin_token_file is not None:
        yield from _unreachable(
            listen.admin_token_file, ("listen", "admin_token_file"), document, "a file that can be read"
        )
    if listen.sync is not None:
        addresses.append((("listen", "sync"), listen.sync))
    yield from _repeated(addresses, document, "listen on an address only once")
    peers: list[tuple[KeyPath, str]] = [(("sync", "peers", i), text) for i, text in enumerate(config.sync.peers)]
    yield from _repeated(peers, document, "list each peer once; is another one missing?")
    for index, path in enumerate(config.rules):
        yield from _unreachable(path, ("rules", index), document, "a file or folder that can be read")
        yield from unread(path, config.rules)
    if config.xds is not None:
        yield from _xds_problems(config, document, completed)
    if config.persistence is not None:
        yield from _persistence_problems(config.persistence, document)
    if config.fabric is not None:
        yield from _redis_problems(config.fabric, config.fabric.url, "fabric", document)
        if config.sync.peers and config.node.region == NodeConfig.model_fields["region"].default:
            expected = "a name that no other region has: what all its sidecars take is known to others under it"
            yield document.problem(("node", "region"), "nothing, beside fabric and sync.peers", expected, "add it")
        if config.persistence is not None:
            fix = "remove one: the Redis of a fabric keeps what was taken"
            yield document.problem(("fabric",), "persistence beside fabric", "one of the two", fix)
    yield from _listener_problems(config, document)
    yield from _mesh_problems(config, document)
    yield from _members_problems(config, document)


def _xds_problems(config: SidecarConfig, document: Document, completed: Completed) -> Iterator[Problem]:
    if config.rules:
        xds = f"{completed.variables['xds'].names} of the environment" if "xds" in completed.variables else "xds"
        yield document.problem(("rules",), f"rules beside {xds}", "one of the two", f"remove rules or {xds}")
    tls = config.xds.tls if config.xds is not None else None
    if tls is None:
        return
    files = {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}
    for name, path in files.items():
        if path is not None:
            yield from _unreachable(path, ("xds", "tls", name), document, "a file that can be read")
    for name, other in (("certificate", "key"), ("key", "certificate")):
        if files[name] is None and files[other] is not None:
            fix = f"add it, or remove {other}"
            yield document.problem(("xds", "tls", name), "nothing", f"the {name} that belongs to xds.tls.{other}", fix)


def _persistence_problems(persistence: PersistenceConfig, document: Document) -> Iterator[Problem]:
    """Problems of `persistence`: keys that do not go together."""
    at = "persistence"
    if (persistence.file is None) == (persistence.url is None):
        found = "neither file nor url" if persistence.file is None else "both file and url"
        yield document.problem((at,), found, "one of the two", "keep one of them")
        return
    for name in ("sentinel", "cluster", "password_file", "password_variable", "tls"):
        if persistence.url is None and getattr(persistence, name):
            yield document.problem((at, name), f"{name} beside file", "it beside url", "remove it")
    if persistence.url is None:
        return
    yield from _redis_problems(persistence, persistence.url, at, document)


def _redis_problems(
    redis: PersistenceConfig | FabricConfig, url: str, at: str, document: Document
) -> Iterator[Problem]:
    is_unix = url.startswith("unix:")
    if redis.cluster and (redis.sentinel is not None or is_unix):
        other = "a unix socket" if is_unix else "sentinel"
        yield document.problem((at, "cluster"), f"true beside {other}", "one of the two", "remove one")
    if redis.sentinel is not None and is_unix:
        yield document.problem((at, "sentinel"), "a name beside a unix socket", "one of the two", "remove one")
    if "," in url.rpartition("@")[2] and not redis.cluster and redis.sentinel is None:
        fix = "name the Sentinels' master in sentinel, or say cluster: true"
        yield document.problem((at, "url"), "several hosts", "one", fix)
    if redis.password_file is not None and redis.password_variable is not None:
        found = "password_file beside password_variable"
        yield document.problem((at, "password_file"), found, "one of the two", "remove one")
    tls = redis.tls
    if tls is None:
        return
    if not url.startswith("rediss:"):
        yield document.problem((at, "tls"), "files beside a url without TLS", "a rediss:// url", "change one of them")
    for name, path in (("ca", tls.ca), ("certificate", tls.certificate), ("key", tls.key)):
        if path is not None:
            yield from _unreachable(path, (at, "tls", name), document, "a file that can be read")


def _listener_problems(config: SidecarConfig, document: Document) -> Iterator[Problem]:
    """Problems of `listen`: TLS files that cannot be used, and protection that is asked for but cannot take effect."""
    listen, tls = config.listen, config.listen.tls
    if tls is None:
        return
    paths = TlsPaths(tls.certificate, tls.key, tls.ca)
    yield from _certificate_problems(
        paths, "listen", document, "a certificate, its key and the authorities of all clients"
    )
    if tls.client_name is not None and tls.ca is None:
        fix = "add the authorities of clients' certificates, or remove client_name"
        yield document.problem(("listen", "tls", "ca"), "nothing", "it beside listen.tls.client_name", fix)
    if all(address.startswith("unix:") for address in listen.grpc):
        fix = "remove one of the two: unix sockets stay plain, and the permissions of their folder guard them"
        yield document.problem(("listen", "tls"), "TLS for unix sockets alone", "a TCP address in listen.grpc", fix)


def _mesh_problems(config: SidecarConfig, document: Document) -> Iterator[Problem]:
    """Problems of `sync`: between machines it needs TLS, with files that can be used."""
    sync, listen = config.sync, config.listen.sync
    tls = sync.tls
    if tls is not None:
        paths = TlsPaths(tls.certificate, tls.key, tls.ca)
        yield from _certificate_problems(
            paths, "sync", document, "a certificate, its key and the authorities of all sidecars"
        )
        if sync.insecure:
            yield document.problem(("sync", "insecure"), "true", "it without sync.tls", "remove one of the two")
        return
    if sync.insecure:
        return
    addresses: list[tuple[KeyPath, str]] = [(("sync", "peers", i), text) for i, text in enumerate(sync.peers)]
    if listen is not None:
        addresses.insert(0, (("listen", "sync"), listen))
    for at, address in addresses:
        if not is_loopback(address):
            expected = "an address of this machine alone, as 127.0.0.1, for a mesh without encryption"
            fix = "add sync.tls with certificate, key and ca; or, in a network of sidecars alone, sync.insecure: true"
            yield document.problem(at, quoted(address), expected, fix)
            # One is enough: the fix is for all of them.
            return


def _certificate_problems(paths: TlsPaths, section: str, document: Document, expected: str) -> Iterator[Problem]:
    """Problems of the files in a section's `tls`."""
    files = {"certificate": paths.certificate, "key": paths.key, "ca": paths.ca}
    missing = [
        problem
        for name, path in files.items()
        if path is not None
        for problem in _unreachable(path, (section, "tls", name), document, "a file that can be read")
    ]
    yield from missing
    if missing:
        return
    try:
        read_checked(paths, "server")
    except OSError as error:
        yield document.problem((section, "tls"), "files that cannot be used", expected, str(error))


def _members_problems(config: SidecarConfig, document: Document) -> Iterator[Problem]:
    """Problems of `sync.members` and its keys: strict limits are shared safely only if they are right."""
    sync, is_strict = config.sync, config.engine is Consistency.STRICT
    if sync.members is None:
        if is_strict:
            fix = "list in it the node ids of all sidecars that share limits, or the regions that have a fabric"
            yield document.problem(("engine",), "strict", "sync.members as well", fix)
        for key, is_given in (("epoch", sync.epoch > 1), ("previous_members", sync.previous_members is not None)):
            if is_given:
                found, fix = f"{key} without members", f"add members, or remove {key}"
                yield document.problem(("sync", key), found, "sync.members beside it", fix)
        return
    if is_strict and config.algorithm != BUCKET_ALGORITHM:
        found, fix = f"{config.algorithm} of strict limits", "remove it, or let CRDT_ENGINE be eventual"
        yield document.problem(("algorithm",), found, f"{BUCKET_ALGORITHM}, which alone can be strict", fix)
    if sync.epoch > 1 and sync.previous_members is None:
        expected = f"the members of epoch {sync.epoch - 1}"
        fix = "add them: without them this sidecar would use its new share beside others that still use their old ones"
        yield document.problem(("sync", "previous_members"), "nothing", expected, fix)
    if sync.epoch == 1 and sync.previous_members is not None:
        fix = "let epoch be one more than it was with them"
        yield document.problem(("sync", "previous_members"), "members before epoch 1", "an epoch above 1", fix)


def _unreachable(path: Path, at: KeyPath, document: Document, expected: str) -> Iterator[Problem]:
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
