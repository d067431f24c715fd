"""What real clients send, as recorded by `fuzz.record`: a file a client, a line of hexadecimal a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fuzz.target import PREFACE, Flags

FOLDER: Final = Path(__file__).parent / "corpus"

MAX_INPUT_BYTES: Final = 8_192


def connections() -> dict[str, bytes]:
    """What was sent on each connection, by a name for it."""
    return {
        f"{file.stem}-{number}": bytes.fromhex(line)
        for file in sorted(FOLDER.glob("*.hex"))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
    }


def as_input(sent: bytes, flags: Flags = Flags(0), seed: int = 0) -> bytes:  # noqa: B008 # immutable
    """An input of the fuzzer that sends this."""
    if sent.startswith(PREFACE):
        sent = sent[len(PREFACE) :]
    else:
        flags |= Flags.RAW_PREFACE
    return bytes([flags]) + seed.to_bytes(2, "big") + sent


def write_inputs(folder: Path) -> None:
    """Write the inputs that the fuzzer begins with, one a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sent in connections().items():
        (folder / name).write_bytes(as_input(sent)[:MAX_INPUT_BYTES])
