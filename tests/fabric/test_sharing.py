"""Which buckets of a shard are shared, without a server."""

from __future__ import annotations

from young import collected_when_told

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.journal import MAX_URGENT_OF_LIMIT
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.sharing import BATCH_BUCKETS, BUSY_US, Ask, SharedRoom, Sharing

NOW_US = 1_700_000_000_000_000
LIMIT = TokenBucketLimit(5, 1_000_000, 5)
HUNDRED = TokenBucketLimit(100, 3_600_000_000, 100)
HERE = Origin("here", 1)


def test_buckets_that_come_and_go_are_not_all_young_to_the_cycle_collector() -> None:
    """Otherwise it looks at tens of thousands at once: it goes by how many more have come than gone."""
    store = Store(HERE, {}.get)
    sharing = Sharing(store, HERE, SharedRoom())
    for number in range(2_000):
        store.bucket(b"k%d" % number, LIMIT, NOW_US).take(1, NOW_US)
    changes = store.drain_changes()
    with collected_when_told() as young_objects:
        for bucket, slots in changes:
            sharing.note(bucket, slots, NOW_US)
        young = young_objects()
    assert len(sharing) == 2_000
    assert len(young) < 1_500


class Node:
    """What a sidecar takes, and what its ticks ask about."""

    def __init__(self, *, most: int = 3_000) -> None:
        self.store = Store(HERE, {}.get)
        self.room = SharedRoom(most)
        self.sharing = Sharing(self.store, HERE, self.room)

    def take(self, key: bytes, hits: int = 1, limit: TokenBucketLimit = HUNDRED) -> None:
        self.store.bucket(key, limit, NOW_US).take(hits, NOW_US)
        for bucket, slots in self.store.drain_changes():
            self.shard_of(key).note(bucket, slots, NOW_US)

    def shard_of(self, _key: bytes) -> Sharing:
        return self.sharing

    def flood(self, count: int, limit: TokenBucketLimit = HUNDRED, name: bytes = b"invented") -> None:
        for number in range(count):
            self.take(b"%s %d" % (name, number), limit=limit)

    def ask_next(self) -> bytes | None:
        key = self.sharing.next_key()
        if key is not None:
            assert self.sharing.ask(key, NOW_US) is not None
        return key

    def tick(self, *, is_last: bool = False) -> list[bytes]:
        self.room.begin_tick(is_last=is_last)
        asked = []
        while (key := self.ask_next()) is not None:
            asked.append(key)
        return asked


def test_what_changes_while_an_answer_is_awaited_that_never_comes_is_told_with_what_was_told_in_vain() -> None:
    node = Node()
    bucket = node.store.bucket(b"k", HUNDRED, NOW_US)

    def change(slot: int) -> None:
        node.sharing.note(bucket, [slot], NOW_US)

    def ask() -> Ask:
        asked = node.sharing.ask(b"k", NOW_US)
        assert asked is not None
        return asked

    change(1)
    node.sharing.check(b"epoch", 1)
    node.sharing.answered(ask(), b"id;;", NOW_US)
    change(2)
    in_vain = ask()
    change(3)
    node.sharing.failed([in_vain])
    assert sorted(ask().told) == [2, 3]


def test_a_bucket_that_is_nearly_used_up_takes_turns_with_those_of_its_limit_that_are_new() -> None:
    node = Node()
    node.flood(2_000)
    node.take(b"honest", 90)
    assert b"honest" in node.tick()[:2]
    assert b"honest" not in node.tick()[:2]
    node.take(b"honest")
    assert node.tick()[0] == b"honest"


def test_invented_keys_of_another_limit_do_not_keep_a_new_bucket_from_hearing_what_others_took() -> None:
    node = Node()
    node.flood(2_000)
    node.take(b"honest", limit=LIMIT)
    assert b"honest" in node.tick()[:2]


def test_a_bucket_that_gets_nearly_used_up_amid_a_tick_is_asked_about_soon() -> None:
    node = Node()
    node.take(b"honest", 50)
    node.flood(50)
    node.room.begin_tick()
    assert node.ask_next() == b"honest"
    for hits in (40, 5, 5):
        assert node.ask_next() != b"honest"
        node.take(b"honest", hits)
        assert b"honest" in (node.ask_next(), node.ask_next())


def test_invented_keys_of_another_limit_that_get_used_up_do_not_hold_up_one_of_this_limit() -> None:
    node = Node()
    node.flood(2_000, limit=TokenBucketLimit(1, 1_000_000, 1))
    node.take(b"honest", 100)
    assert b"honest" in node.tick()[:2]


def test_buckets_that_are_nearly_used_up_without_end_do_not_make_a_tick_endless() -> None:
    node = Node()
    node.take(b"new 0", 100)
    node.room.begin_tick()
    assert node.ask_next() == b"new 0"
    node.take(b"new 1", 100)
    assert node.ask_next() is None
    assert node.tick()[0] == b"new 1"


def test_a_bucket_that_stays_nearly_used_up_takes_one_place_only() -> None:
    node = Node()
    node.flood(500)
    node.take(b"first", 90)
    for _ in range(MAX_URGENT_OF_LIMIT):
        node.sharing.note(node.store.bucket(b"first", HUNDRED, NOW_US), [], NOW_US)
    node.take(b"second", 90)
    # In between are two that are new.
    assert [key for key in node.tick()[:4] if key in {b"first", b"second"}] == [b"first", b"second"]


def test_a_tick_asks_about_some_only_and_the_next_ones_about_the_others() -> None:
    node = Node()
    node.flood(2_900)
    asked = set[bytes]()
    for _ in range(29):
        of_tick = node.tick()
        assert len(of_tick) <= 125
        asked.update(of_tick)
    assert len(asked) == 2_900


def test_while_there_is_much_to_tell_buckets_that_were_told_do_not_take_the_turn_of_others() -> None:
    node = Node()
    node.flood(1_000)
    for _ in range(10):
        node.tick()
    node.flood(1_000, name=b"further")
    asked = {key for _ in range(15) for key in node.tick()}
    assert asked >= {b"further %d" % number for number in range(1_000)}


def test_the_last_tick_tells_everything() -> None:
    node = Node()
    node.flood(2_000)
    assert len(node.tick(is_last=True)) == 2_000


def test_where_there_is_no_room_the_bucket_with_more_taken_is_shared() -> None:
    node = Node(most=100)
    node.flood(101)
    assert node.sharing.unshared == 1
    node.take(b"honest")
    node.take(b"honest")
    assert len(node.sharing) == 100
    assert b"honest" in node.tick(is_last=True)


def test_where_there_is_no_room_a_bucket_with_less_taken_than_others_is_not_shared() -> None:
    node = Node(most=100)
    for number in range(100):
        node.take(b"%d" % number, 50)
    node.take(b"newcomer")
    assert node.sharing.unshared == 1
    assert b"newcomer" not in node.tick(is_last=True)


def test_a_bucket_that_is_nearly_used_up_does_not_make_room_for_one_with_less_taken() -> None:
    node = Node(most=100)
    node.take(b"honest", 90)
    node.flood(99)
    for number in range(300):
        node.take(b"flooded %d" % number, 50)
    assert set(node.tick(is_last=True)) == {b"honest"} | {b"flooded %d" % number for number in range(99)}


def test_a_bucket_that_gets_nearly_used_up_gets_room_among_invented_keys_that_are_used_up() -> None:
    node = Node(most=100)
    node.flood(200, limit=TokenBucketLimit(1, 1_000_000, 1))
    node.take(b"honest", 90)
    node.flood(200, limit=TokenBucketLimit(1, 1_000_000, 1), name=b"further")
    assert b"honest" in node.tick()[:2]


def test_a_bucket_in_the_queue_of_the_nearly_used_up_ones_does_not_make_room() -> None:
    node = Node(most=100)
    others = [TokenBucketLimit(1, 1_000_000 + number, 100) for number in range(2)]
    node.take(b"honest", 80, limit=others[0])
    for number in range(99):
        node.take(b"busy %d" % number, 50)
    # So the first ones find no place in the queue.
    for number in reversed(range(99)):
        node.take(b"busy %d" % number, 45)
    node.take(b"honest", 10, limit=others[0])
    node.take(b"newcomer", 100, limit=others[1])
    assert {b"honest", b"newcomer"} <= set(node.tick(is_last=True))


def test_a_bucket_that_has_made_room_for_another_one_is_not_asked_about() -> None:
    node = Node(most=100)
    for number in range(100):
        node.take(b"nearly %d" % number, 90)
    node.take(b"another", 90, limit=TokenBucketLimit(1, 1_000_000, 100))
    asked = node.tick(is_last=True)
    assert b"another" in asked
    assert len(asked) == 100


class NodeOnACluster(Node):
    """Keys that begin with `x` are all of one shard, the others of another one."""

    def __init__(self, *, most: int) -> None:
        super().__init__(most=most)
        self.other = Sharing(self.store, HERE, self.room)

    def shard_of(self, key: bytes) -> Sharing:
        return self.sharing if key.startswith(b"x") else self.other


def test_buckets_of_one_shard_have_the_room_of_all() -> None:
    node = NodeOnACluster(most=100)
    node.flood(100, name=b"x")
    assert len(node.sharing) == 100
    assert node.sharing.unshared == node.other.unshared == 0


def test_where_all_room_is_of_one_shard_it_is_that_one_which_makes_some_for_the_others() -> None:
    node = NodeOnACluster(most=100)
    node.flood(100, name=b"x")
    for number in range(50):
        node.take(b"honest %d" % number, 2)
    assert (len(node.sharing), len(node.other)) == (50, 50)
    assert node.room.taken == 100


def test_buckets_that_rest_in_any_shard_make_room_before_busy_ones() -> None:
    node = NodeOnACluster(most=100)
    node.flood(40, name=b"honest")
    node.room.begin_tick()
    while (key := node.other.next_key()) is not None:
        node.other.ask(key, NOW_US + BUSY_US + 1)
    assert (node.other.busy, node.other.resting) == (0, 40)
    node.flood(70, name=b"x")
    assert (len(node.sharing), len(node.other)) == (70, 30)
    assert node.sharing.unshared == 0


def test_a_shard_with_most_of_the_busy_buckets_has_most_of_a_tick() -> None:
    node = NodeOnACluster(most=30_000)
    node.flood(9_000, name=b"x")
    node.take(b"honest")
    node.room.begin_tick()
    asked = 0
    while node.ask_next() is not None:
        asked += 1
    assert 900 < asked <= 1_000
    assert node.other.next_key() == b"honest"


def test_each_shard_has_a_batch_of_each_tick() -> None:
    node = NodeOnACluster(most=3_000)
    node.flood(2_000, name=b"x")
    node.flood(BATCH_BUCKETS, name=b"honest")
    node.room.begin_tick()
    for _ in range(BATCH_BUCKETS):
        key = node.other.next_key()
        assert key is not None
        assert node.other.ask(key, NOW_US) is not None


def test_room_is_right_after_any_history() -> None:
    node = NodeOnACluster(most=50)
    for number in range(500):
        node.take(b"%s%d" % (b"x" if number % 3 else b"y", number), 1 + number % 7)
        if number % 40 == 0:
            node.tick()
            key = node.other.next_key()
            if key is not None:
                # Past its use.
                node.other.ask(key, NOW_US + 60_000_000)
        assert node.room.taken == len(node.sharing) + len(node.other) <= 50
