"""Frames in words, for the trace of a run."""

from __future__ import annotations

from google.protobuf import text_format

from ratelimit_sidecar.replication.v1 import replication_pb2 as pb


def text_of(raw: bytes) -> str:
    """One line."""
    return str(text_format.MessageToString(pb.Frame.FromString(raw), as_one_line=True))
