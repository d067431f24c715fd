"""An xDS resource as a document of rules, so that it is read and checked as a file is."""

from __future__ import annotations

from collections.abc import Mapping

from ratelimit_sidecar.config.document import Document
from ratelimit_sidecar.config.yaml_data import YamlList, YamlMap


def document_of_resource(name: str, data: Mapping[str, object]) -> Document:
    """The document of the resource `name`: it has no lines, so its problems name only the key.

    Args:
        data: nested no deeper than protobuf reads (100 messages).
    """
    return Document(name, _convert(data), None)


def _convert(value: object) -> object:
    """The same in containers of ours."""
    if isinstance(value, Mapping):
        out = YamlMap()
        out.update((key, _convert(inner)) for key, inner in value.items())
        return out
    if isinstance(value, list):
        items = YamlList()
        items.extend(map(_convert, value))
        return items
    return value
