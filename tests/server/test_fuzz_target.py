"""What must hold of a connection whatever a client sends (`fuzz.target`), for what real clients send. The fuzzer tries
the rest: `make fuzz`."""

from __future__ import annotations

import pytest
from fuzz import corpus, mutator, target

RECORDED = corpus.connections()


@pytest.mark.parametrize("client", ["curl", "envoy", "grpcio", "h2load", "h2spec", "nghttp"])
def test_promises_hold_for_what_a_client_sends_however_it_is_cut(client: str) -> None:
    sent = [data for name, data in RECORDED.items() if name.startswith(client)]

    for data in sent:
        for flags in (
            target.Flags.SMALL_READS,
            target.Flags.SLOW | target.Flags.LAZY_OUTPUT,
            target.Flags.DRAIN | target.Flags.STREAMING_TALKS | target.Flags.REFUSE,
            target.Flags.TERMINATE | target.Flags.SMALL_READS,
        ):
            target.play(corpus.as_input(data, flags))

    assert sent


@pytest.mark.parametrize("client", ["envoy-1", "grpcio-1", "h2load-1"])
def test_the_target_reaches_the_calls_of_grpc_clients(client: str) -> None:
    run = target.play(corpus.as_input(RECORDED[client]))

    assert len(run.seen_calls) >= 5
    assert run.seen_calls <= run.answered


def test_a_changed_input_keeps_its_frames() -> None:
    data = corpus.as_input(RECORDED["grpcio-1"])

    changed = [mutator.mutate(data, 10_000, seed, lambda payload, _size: payload) for seed in range(100)]

    reached = [len(target.play(one).seen_calls) for one in changed]
    assert sum(calls > 0 for calls in reached) > 50
