"""A registry as the text Prometheus scrapes, encoded in slices: requests are decided between two of them.

A sample takes some 4 us to encode, so a thousand rules in one go would hold up every request for 20 ms, which is
Envoy's default timeout. A slice is about half a millisecond.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SLICE_SAMPLES = 128

_OPENMETRICS_END = b"# EOF\n"


async def encode_registry(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Encode all metrics.

    Every family is read at one instant, but different families at slightly different ones.

    Args:
        accept: the Accept header of the scrape; it chooses OpenMetrics or the classic text format.

    Returns:
        The body and its content type.
    """
    encode, content_type = choose_encoder(accept)
    text: list[bytes] = []
    for family in registry.collect():
        for start in range(0, max(len(family.samples), 1), SLICE_SAMPLES):
            encoded = encode(_Only(_slice(family, start))).removesuffix(_OPENMETRICS_END)
            text.append(_without_headers(encoded) if start else encoded)
            await asyncio.sleep(0)
    if content_type.startswith("application/openmetrics-text"):
        text.append(_OPENMETRICS_END)
    return b"".join(text), content_type


class _Only(Collector):
    """What the encoders take for a registry: one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _slice(family: Metric, start: int) -> Metric:
    part = Metric(family.name, family.documentation, family.type, family.unit)
    part.samples = family.samples[start : start + SLICE_SAMPLES]
    return part


def _without_headers(encoded: bytes) -> bytes:
    """Less HELP, TYPE and UNIT, which the family's first slice has given; no sample begins with a hash."""
    return b"".join(line for line in encoded.splitlines(keepends=True) if not line.startswith(b"#"))
