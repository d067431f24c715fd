"""Values that several of envoyproxy/ratelimit's variables make together: addresses, and the folder of rules.

Addresses come as a host and a port, joined as Go's net.JoinHostPort does. Rules files are in
`RUNTIME_ROOT/RUNTIME_SUBDIRECTORY/RUNTIME_APPDIRECTORY`, joined as Go's path.Join does.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path

from ratelimit_sidecar.config.environment import Unreadable
from ratelimit_sidecar.config.structure import FromEnvironment
from ratelimit_sidecar.config.yaml_data import resolve

DEFAULT_ROOT = "/srv/runtime_data/current"
DEFAULT_APP_DIRECTORY = "config"


def _grpc_address(values: Mapping[str, str]) -> object:
    socket = values.get("GRPC_UDS")
    if socket is not None:
        return [f"unix:{socket}"]
    return [_address(values.get("GRPC_HOST", "0.0.0.0"), values.get("GRPC_PORT", "8081"))]  # noqa: S104 - the default


def _http_address(values: Mapping[str, str]) -> object:
    return _address(values.get("HOST", "127.0.0.1"), values.get("PORT", "8080"))


def _address(host: str, port: str) -> str:
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    number = resolve(port)
    return f"{host}:{number if isinstance(number, int) else port}"


def _runtime_folder(values: Mapping[str, str]) -> object:
    if not values.keys() & {"RUNTIME_ROOT", "RUNTIME_SUBDIRECTORY"}:
        return None
    return [_join_runtime(values)]


def _join_runtime(values: Mapping[str, str]) -> str:
    parts = [
        values.get("RUNTIME_ROOT") or DEFAULT_ROOT,
        values.get("RUNTIME_SUBDIRECTORY", ""),
        values.get("RUNTIME_APPDIRECTORY") or DEFAULT_APP_DIRECTORY,
    ]
    joined = "/".join(filter(None, parts))
    # POSIX lets two slashes at the beginning mean something else, and so Python keeps them.
    return posixpath.normpath("/" + joined.lstrip("/") if joined.startswith("/") else joined)


def default_folder(environ: Mapping[str, str]) -> Path | None:
    """The folder of rules if neither file nor environment names one; None if there is no such folder."""
    folder = Path(_join_runtime({"RUNTIME_APPDIRECTORY": environ.get("RUNTIME_APPDIRECTORY", "")}))
    try:
        return folder if folder.is_dir() else None
    except OSError:
        return None


def _xds_server(values: Mapping[str, str]) -> object:
    # The schemes of gRPC's targets that leave host and port as they are (grpc/doc/naming.md).
    return values["CONFIG_GRPC_XDS_SERVER_URL"].removeprefix("dns:///").removeprefix("passthrough:///")


def _xds_when_asked_for(values: Mapping[str, str]) -> object:
    kind = values["CONFIG_TYPE"]
    if kind not in ("FILE", "GRPC_XDS_SOTW"):
        raise Unreadable("FILE or GRPC_XDS_SOTW")
    return {} if kind == "GRPC_XDS_SOTW" else None


GRPC_ADDRESS = FromEnvironment(("GRPC_UDS", "GRPC_HOST", "GRPC_PORT"), _grpc_address)
HTTP_ADDRESS = FromEnvironment(("HOST", "PORT"), _http_address)
RUNTIME_FOLDER = FromEnvironment(("RUNTIME_ROOT", "RUNTIME_SUBDIRECTORY", "RUNTIME_APPDIRECTORY"), _runtime_folder)
XDS_SERVER = FromEnvironment(("CONFIG_GRPC_XDS_SERVER_URL",), _xds_server)
XDS_WHEN_ASKED_FOR = FromEnvironment(("CONFIG_TYPE",), _xds_when_asked_for)
