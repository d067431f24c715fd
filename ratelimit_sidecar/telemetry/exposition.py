"""A registry as the text Prometheus scrapes, encoded in slices: requests are decided between two of them.

A sample takes 5 to 20 us to encode, so a thousand rules in one go would hold up every request for longer than Envoy's
default timeout, 20 ms. A slice is about half a millisecond, and however many scrape at once, one slice is encoded in
a turn of the event loop. The text of 20,000 rules has 20 MB: it is never there as a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

SLICE_SAMPLES = 32

PIECE_BYTES = 16_384
"""Of the body: slices are sent together until they have as many."""

_OPENMETRICS_END = b"# EOF\n"


class Exposition:
    """Encodes one registry for everybody who scrapes it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._one_slice = asyncio.Lock()

    def encode(self, accept: str) -> tuple[AsyncIterator[bytes], str]:
        """Encode all metrics. A sample is read just before it is encoded.

        Args:
            accept: the Accept header of the scrape; it chooses OpenMetrics or the classic text format.

        Returns:
            The body in pieces, and its content type.
        """
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # It compares what is no version.
            encode, content_type = choose_encoder("")
        return self._encoded(encode, content_type.startswith("application/openmetrics-text")), content_type

    async def _encoded(self, encode: Callable[[Collector], bytes], is_openmetrics: bool) -> AsyncIterator[bytes]:
        slices = _slices(self._registry)
        piece = b""
        while True:
            async with self._one_slice:
                found = next(slices, None)
                if found is None:
                    break
                family, is_first = found
                text = encode(_Only(family)).removesuffix(_OPENMETRICS_END)
                await asyncio.sleep(0)
            piece += text if is_first else _without_headers(text)
            if len(piece) >= PIECE_BYTES:
                yield piece
                piece = b""
        yield piece + _OPENMETRICS_END if is_openmetrics else piece


def _slices(registry: CollectorRegistry) -> Iterator[tuple[Metric, bool]]:
    """Parts of families with up to `SLICE_SAMPLES` each, and whether one is the first of its family."""
    for family in registry.collect():
        samples = iter(family.samples)
        part = list(islice(samples, SLICE_SAMPLES))
        yield _part(family, part), True
        while part := list(islice(samples, SLICE_SAMPLES)):
            yield _part(family, part), False


class _Only(Collector):
    """What the encoders take for a registry: one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _part(family: Metric, samples: list[Sample]) -> Metric:
    part = Metric(family.name, family.documentation, family.type, family.unit)
    part.samples = samples
    return part


def _without_headers(encoded: bytes) -> bytes:
    """Less HELP, TYPE and UNIT, which the family's first slice has given; no sample begins with a hash.

    A label may have a carriage return in it, from a value of a caller's, which ends no line.
    """
    return b"\n".join([line for line in encoded.split(b"\n") if not line.startswith(b"#")])
