"""One round of a whole server: what it answers, how long that takes, and what it takes of the processors for it.

Processor time is the server's alone: it says what a request costs, however busy the machine is.

- `in_lock_step`: h2load, which sends the next requests when it has read answers. A server that answers all requests of
  one read by one write is then sent as many at once again, and so on: it is at its best.
- `when_due`: requests that come one by one, at a rate, whatever else is under way: few are read together. Real
  callers are somewhere between, so neither figure is to be quoted without the other.
"""

from __future__ import annotations

from benchmarks.serving.frames import Headers
from benchmarks.serving.generator import Body, Generator
from benchmarks.serving.h2load import Load, LoadFailed, grpc_load
from benchmarks.serving.rounds import Figures
from benchmarks.serving.servers import Server

PERCENTS = (50, 99)
PERCENTILES_FOR_SECONDS = 0.5

CPU = "CPU us"
"""Of a request. Only of servers whose process is known."""


def in_lock_step(
    server: Server,
    request: bytes,
    load: Load,
    seconds: float,
    *,
    percentiles: bool = False,
    headers: Headers = (),
    answer_bytes: int = 0,
) -> Figures:
    """Measure a server at its best, by h2load; see above.

    Args:
        percentiles: by a second, short run, since h2load is slower while it notes each request.
        headers: besides those of gRPC.
        answer_bytes: of the data of each answer, about; 0 for any.

    Raises:
        LoadFailed: not everything was answered, or with clearly less data: errors of gRPC have none.
    """
    before = _cpu_seconds(server)
    measured = grpc_load(server.address, request, load, seconds, headers=headers)
    cpu_us = (_cpu_seconds(server) - before) * 1e6 / (measured.per_second * seconds)
    # A few bytes more or less are numbers that are written shorter or longer.
    if measured.data_bytes < 0.9 * answer_bytes:
        raise LoadFailed(f"{measured.data_bytes:.1f} bytes an answer in place of {answer_bytes}: some were errors")
    figures = {"requests/s": measured.per_second, "mean us": measured.mean_us}
    if percentiles:
        noted = grpc_load(
            server.address, request, load, min(seconds, PERCENTILES_FOR_SECONDS), PERCENTS, headers=headers
        )
        figures |= {f"p{percent:g} us": took_us for percent, took_us in noted.percentiles_us.items()}
    return figures if server.pid is None else {**figures, CPU: cpu_us}


def when_due(
    server: Server, body: Body, load: Load, rate: float, seconds: float, *, headers: Headers = (), admits: bool = True
) -> Figures:
    """Measure a server by requests that come one by one at a rate; see above.

    Args:
        load: connections, and the most requests under way on each; latency counts from when a request was due all the
            same.
        admits: whether each request is to be admitted.

    Raises:
        LoadFailed: as of `Generator.run`, or a request was not admitted.
    """
    with Generator(server.address, load, headers) as generator:
        before = _cpu_seconds(server)
        answered = generator.run(body, seconds, rate)
        cpu_us = (_cpu_seconds(server) - before) * 1e6 / len(answered.latencies_ns)
    if admits and answered.admitted < len(answered.latencies_ns):
        raise LoadFailed(f"only {answered.admitted:,} of {len(answered.latencies_ns):,} requests were admitted")
    figures = {"requests/s": answered.per_second}
    figures |= {f"p{percent:g} us": answered.percentile_us(percent) for percent in PERCENTS}
    return figures if server.pid is None else {**figures, CPU: cpu_us}


def _cpu_seconds(server: Server) -> float:
    return 0.0 if server.pid is None else server.cpu_seconds
