"""envoyproxy/ratelimit's variables that have no counterpart of their own: several make one value here.

Addresses come in halves there. Rules files lie in `RUNTIME_ROOT/RUNTIME_SUBDIRECTORY/RUNTIME_APPDIRECTORY`, all of
whose files are rules; here a folder's files are by their suffix, so what would go unread is an error instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ratelimit_sidecar.config.environment import Unreadable
from ratelimit_sidecar.config.errors import Problem, quoted
from ratelimit_sidecar.config.rules_file import is_rules_file
from ratelimit_sidecar.config.structure import FromEnvironment

DEFAULT_ROOT = "/srv/runtime_data/current"
DEFAULT_APP_DIRECTORY = "config"


def _grpc_address(values: Mapping[str, str]) -> object:
    socket = values.get("GRPC_UDS")
    if socket is not None:
        return [f"unix:{socket}"]
    return [f"{values.get('GRPC_HOST', '0.0.0.0')}:{values.get('GRPC_PORT', '8081')}"]  # noqa: S104 - the default


def _http_address(values: Mapping[str, str]) -> object:
    return f"{values.get('HOST', '127.0.0.1')}:{values.get('PORT', '8080')}"


def _runtime_folder(values: Mapping[str, str]) -> object:
    if not values.keys() & {"RUNTIME_ROOT", "RUNTIME_SUBDIRECTORY"}:
        return None
    folder = Path(values.get("RUNTIME_ROOT", DEFAULT_ROOT), values.get("RUNTIME_SUBDIRECTORY", ""))
    return [str(folder / values.get("RUNTIME_APPDIRECTORY", DEFAULT_APP_DIRECTORY))]


def _xds_when_asked_for(values: Mapping[str, str]) -> object:
    kind = values["CONFIG_TYPE"]
    if kind not in ("FILE", "GRPC_XDS_SOTW"):
        raise Unreadable("FILE or GRPC_XDS_SOTW")
    return {} if kind == "GRPC_XDS_SOTW" else None


GRPC_ADDRESS = FromEnvironment(("GRPC_UDS", "GRPC_HOST", "GRPC_PORT"), _grpc_address)
HTTP_ADDRESS = FromEnvironment(("HOST", "PORT"), _http_address)
RUNTIME_FOLDER = FromEnvironment(("RUNTIME_ROOT", "RUNTIME_SUBDIRECTORY", "RUNTIME_APPDIRECTORY"), _runtime_folder)
XDS_WHEN_ASKED_FOR = FromEnvironment(("CONFIG_TYPE",), _xds_when_asked_for)


def unread(folder: Path) -> Iterator[Problem]:
    """What envoyproxy/ratelimit would read in its runtime folder and this program does not."""
    for entry in _entries(folder):
        if entry.name.startswith(".") or is_rules_file(entry):
            continue
        if not entry.is_dir():
            expected = "a name that ends in .yaml or .yml in a folder of rules"
            yield Problem(str(entry), None, None, "", f"the name {quoted(entry.name)}", expected, "rename it")
        elif any(is_rules_file(below) for below in _entries(entry)):
            expected, fix = "a folder without subfolders", "list both folders under rules in the configuration file"
            yield Problem(str(entry), None, None, "", "rules in a subfolder", expected, fix)


def _entries(folder: Path) -> list[Path]:
    # What keeps a folder from being read is told by who reads it.
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []
