"""Changes inputs frame by frame, so that most of what the fuzzer tries is still HTTP/2 in part.

libFuzzer's own changes, made to the bytes, would hardly ever keep a frame's length right.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz.target import FRAME_HEADER_BYTES, HEADER_BYTES, PREFACE

Mutate = Callable[[bytes, int], bytes]
"""libFuzzer's own: changes the bytes, up to a size."""

MAX_STREAM_ID = 2**31 - 1

_TRICKY_LENGTHS = (-1, 1, 9)


def mutate(data: bytes, max_size: int, seed: int, change_bytes: Mutate) -> bytes:
    """One change, or a few."""
    chance = random.Random(seed)
    kind = chance.random()
    if kind < 0.1 or len(data) < HEADER_BYTES + FRAME_HEADER_BYTES:
        return change_bytes(data, max_size)
    header, client = data[:HEADER_BYTES], data[HEADER_BYTES:]
    if kind < 0.2:
        return bytes(chance.randrange(256) for _ in header) + client
    preface = PREFACE if client.startswith(PREFACE) else b""
    frames = _cut(client[len(preface) :])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _change(frames, chance, change_bytes)
    return (header + preface + b"".join(frames))[:max_size]


def cross(first: bytes, second: bytes, max_size: int, seed: int) -> bytes:
    """The beginning of one and the end of another."""
    chance = random.Random(seed)
    begin, end = _cut(first[HEADER_BYTES:]), _cut(second[HEADER_BYTES:])
    frames = begin[: chance.randint(0, len(begin))] + end[chance.randint(0, len(end)) :]
    return (first[:HEADER_BYTES] + b"".join(frames))[:max_size]


def _cut(data: bytes) -> list[bytes]:
    frames = []
    while len(data) >= FRAME_HEADER_BYTES:
        length = FRAME_HEADER_BYTES + int.from_bytes(data[:3], "big")
        frames.append(data[:length])
        data = data[length:]
    if data:
        frames.append(data)
    return frames


def _change(frames: list[bytes], chance: random.Random, change_bytes: Mutate) -> None:
    if not frames:
        return
    at = chance.randrange(len(frames))
    frame = frames[at]
    match chance.randrange(9):
        case 0:
            del frames[at]
        case 1:
            frames.insert(at, frame)
        case 2:
            frames.insert(at, chance.choice(frames))
        case 3:
            other = chance.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
        case 4:
            frames[at:at] = [frame] * chance.choice((2, 10, 100))
        case 5:
            kind = bytes([chance.randrange(12) if chance.random() < 0.9 else chance.randrange(256)])
            frames[at] = frame[:3] + kind + frame[4:]
        case 6:
            flags = chance.choice((0, 1, 4, 5, 8, 0x20, chance.randrange(256)))
            frames[at] = frame[:4] + bytes([flags]) + frame[5:]
        case 7:
            now = int.from_bytes(frame[5:9], "big")
            stream_id = chance.choice((0, 1, 3, max(0, now - 2), now + 1, now + 2, now + 20, MAX_STREAM_ID))
            frames[at] = frame[:5] + (stream_id & 0xFFFFFFFF).to_bytes(4, "big") + frame[9:]
        case _:
            payload = change_bytes(frame[FRAME_HEADER_BYTES:] or b"\0", 2 * len(frame) + 8)
            length = len(payload)
            if chance.random() < 0.1:
                length = max(0, length + chance.choice(_TRICKY_LENGTHS))
            frames[at] = length.to_bytes(3, "big") + frame[3:9] + payload
