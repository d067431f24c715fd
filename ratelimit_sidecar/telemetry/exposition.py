"""A registry as the text that Prometheus scrapes, encoded in slices, so that requests are decided in between.

A sample takes 5 to 20 us to encode. A thousand rules in one go would delay every request for longer than Envoy's
default timeout, 20 ms. A slice takes about half a millisecond, and only one is encoded in each turn of the event loop,
however many scrapes there are. The text of 20,000 rules has 20 MB, and never exists as a whole.
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
"""The body is sent in pieces of at least this size, each of several slices."""

_OPENMETRICS_END = b"# EOF\n"


class Exposition:
    """Encodes one registry for all scrapes."""

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
            # The library fails to compare a malformed version.
            encode, content_type = choose_encoder("")
        return self._encoded(encode, content_type.startswith("application/openmetrics-text")), content_type

    async def _encoded(self, encode: Callable[[Collector], bytes], is_openmetrics: bool) -> AsyncIterator[bytes]:
        slices = sample_slices(self._registry)
        piece = b""
        while True:
            async with self._one_slice:
                found = next(slices, None)
                if found is None:
                    break
                family, samples, is_first = found
                text = encode(_Only(_part(family, samples))).removesuffix(_OPENMETRICS_END)
                await asyncio.sleep(0)
            piece += text if is_first else _without_headers(text)
            if len(piece) >= PIECE_BYTES:
                yield piece
                piece = b""
        yield piece + _OPENMETRICS_END if is_openmetrics else piece


def sample_slices(
    registry: CollectorRegistry, *, whole_histograms: bool = False
) -> Iterator[tuple[Metric, list[Sample], bool]]:
    """Slices of up to `SLICE_SAMPLES` samples: the family, its next samples, and True for the first slice of a family.

    The first slice of a family may be empty.

    Args:
        whole_histograms: True to put all samples of a histogram, which are few, into one slice.
    """
    for family in registry.collect():
        size = None if whole_histograms and family.type == "histogram" else SLICE_SAMPLES
        samples = iter(family.samples)
        yield family, list(islice(samples, size)), True
        while part := list(islice(samples, size)):
            yield family, part, False


class _Only(Collector):
    """A registry with one family, for the encoders."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _part(family: Metric, samples: list[Sample]) -> Metric:
    part = Metric(family.name, family.documentation, family.type, family.unit)
    part.samples = samples
    return part


def _without_headers(encoded: bytes) -> bytes:
    """The samples without HELP, TYPE and UNIT, which the family's first slice has; no sample begins with a hash.

    A label may contain a carriage return, from a caller's value. It does not end a line.
    """
    return b"\n".join([line for line in encoded.split(b"\n") if not line.startswith(b"#")])
