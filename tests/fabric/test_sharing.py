"""Which buckets of a shard are shared, without a server."""

from __future__ import annotations

from young import collected_when_told

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.sharing import Sharing

NOW_US = 1_700_000_000_000_000
LIMIT = Limit(5, 1_000_000, 5)
HERE = Origin("here", 1)


def test_buckets_that_come_and_go_are_not_all_young_to_the_cycle_collector() -> None:
    """Otherwise it looks at tens of thousands at once: it goes by how many more have come than gone."""
    store = Store(HERE, {}.get)
    sharing = Sharing(store, HERE)
    for number in range(2_000):
        store.bucket(b"k%d" % number, LIMIT, NOW_US).take(1, NOW_US)
    changes = store.drain_changes()
    with collected_when_told() as young_objects:
        for bucket, slots in changes:
            sharing.note(bucket, slots, NOW_US)
        young = young_objects()
    assert len(sharing) == 2_000
    assert len(young) < 1_500
