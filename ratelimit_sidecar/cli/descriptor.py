"""Descriptors as they are written on the command line."""

from __future__ import annotations

import click


def entries_of(text: str) -> list[tuple[str, str]]:
    r"""`key=value,key=value`, with \, for a comma and \\ for a backslash.

    Raises:
        click.UsageError: it is none.
    """
    return [_entry(part, text) for part in _split(text)]


def _split(text: str) -> list[str]:
    parts = [""]
    characters = iter(text)
    for character in characters:
        if character == "\\":
            parts[-1] += next(characters, "\\")
        elif character == ",":
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _entry(part: str, text: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not key or not equals:
        raise click.UsageError(f"{text!r} is no descriptor: expected key=value, or several with commas between")
    return key, value
