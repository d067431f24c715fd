"""The region's account and the sidecars that draw from it as a state machine: no history exceeds the limit.

The sidecars' side is the real code; the server is a model, or the scripts on a real server with the model's time. Time
is virtual. The oracle is one bucket to which every admission goes at its true time. Steps, and not the events of
`simulation`, move it, since Hypothesis decides when a call is done, late or again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fabric.accounts_model import KEPT, Broken, Shard
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from persistence.redis_server import SERVERS, RedisServer, needs_redis
from redis import Redis
from redis.exceptions import ResponseError

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.draw_policy import draw_needs
from ratelimit_sidecar.crdt.granted import COUNTED_US, GRANT_US, GrantedBucket, Needs
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.places import BucketPlaces
from ratelimit_sidecar.fabric.account_calls import CALLER_RENEWED_US, AccountCalls, Asked, members_text
from ratelimit_sidecar.fabric.accounts import BEAT, DRAW
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.fabric.status import DrawStatus
from simulation.textbook import TextbookBucket

KEY = b"k"
SHARD = FabricKeys("ratelimit").shards[0]
SIDECARS = ("a", "b", "c")
SECOND_US = 1_000_000
BEAT_US = 100_000
DRIFT_PPM = 5_000
START_US = 1_000_000 * SECOND_US
LIMITS = (
    TokenBucketLimit(40, SECOND_US, 60),
    TokenBucketLimit(5, 8 * SECOND_US, 5),
    TokenBucketLimit(100, SECOND_US, 100),
    TokenBucketLimit(8, SECOND_US, 30),
)


class Hoarder(GrantedBucket):
    """A broken rule: it spends what it holds whenever it likes."""

    def advance(self, now_us: int) -> None:
        self.expires_us = now_us + 1
        super().advance(now_us)


class Resender(AccountCalls):
    """A broken rule: after a call without an answer it ends its former grant once more."""

    def ask(self, bucket: GrantedBucket, needs: Needs) -> Asked | None:
        asked = super().ask(bucket, needs)
        assert asked is not None
        if asked.request.generation >= 0:
            self.last = asked.request
        elif hasattr(self, "last"):
            request = replace(
                asked.request, generation=self.last.generation, ends=max(self.last.ends, asked.request.kept)
            )
            return Asked(bucket, request, asked.lineage)
        return asked


class Sidecar:
    """One life of it, with a clock of its own."""

    def __init__(
        self, name: str, limit: TokenBucketLimit, drift_ppm: int, draws: type[AccountCalls], bucket: type[GrantedBucket]
    ) -> None:
        self.drift_ppm = drift_ppm
        self.draws = draws("east", DrawStatus(), BucketPlaces(100, lambda key: key))
        self.bucket = bucket(KEY, limit, Origin(name, 1), 0)

    def now_us(self, true_us: int) -> int:
        return true_us + true_us * self.drift_ppm // SECOND_US


@dataclass
class Call:
    sidecar: Sidecar
    arguments: list[str]
    asked: list[Asked]
    sent_us: int
    answer: Any = None


class Server:
    """A Redis server and its replica, each with a model of the accounts.

    Args:
        clock_us: how far its clock is off.
    """

    def __init__(self, broken: Broken) -> None:
        self.shard = Shard(broken)
        self.history = "h0"
        self.clock_us = 0
        self.replica = deepcopy(self.shard)

    def beat(self, lineage: str, members: str, now_us: int) -> None:
        self.shard.beat(lineage, members, self.history, now_us + self.clock_us)

    def draw(self, arguments: list[str], now_us: int) -> list[Any] | None:
        return self.shard.draw(arguments, self.history, now_us + self.clock_us)

    def replicate(self) -> None:
        self.replica = deepcopy(self.shard)

    def become(self, history: str, clock_us: int) -> None:
        """The replica takes over, or it is started again with what was on its disk."""
        self.shard = deepcopy(self.replica)
        self.history, self.clock_us = history, clock_us

    def flush(self) -> None:
        self.shard.flush()


class ScriptedServer(Server):
    """A real server, whose answers are those of the model. Its time and replication id are the test's.

    Args:
        path: of its socket.
    """

    path: ClassVar[str] = ""

    def __init__(self, broken: Broken) -> None:
        super().__init__(broken)
        self.redis = Redis(unix_socket_path=self.path)
        self.redis.flushall()
        self.saved: list[Any] = [None, None]

    def _run(self, script: str, keys: Sequence[bytes], arguments: Sequence[str], now_us: int) -> Any:
        given = "local history, time = server_history(), server_time()"
        assert given in script
        script = script.replace(given, f"local history, time = '{self.history}', {now_us + self.clock_us}")
        return self.redis.eval(script, len(keys), *keys, *arguments)

    def beat(self, lineage: str, members: str, now_us: int) -> None:
        super().beat(lineage, members, now_us)
        self._run(BEAT, [*SHARD.of_accounts, SHARD.fence], [lineage, "1", members, "0", "1000", "1"], now_us)

    def draw(self, arguments: list[str], now_us: int) -> list[Any] | None:
        expected = super().draw(arguments, now_us)
        if expected is None:
            with pytest.raises(ResponseError, match="AGAIN"):
                self._run(DRAW, SHARD.of_accounts, arguments, now_us)
        else:
            assert self._run(DRAW, SHARD.of_accounts, arguments, now_us) == expected
        return expected

    def replicate(self) -> None:
        super().replicate()
        self.saved = [self.redis.dump(key) for key in SHARD.of_accounts]

    def become(self, history: str, clock_us: int) -> None:
        super().become(history, clock_us)
        for key, saved in zip(SHARD.of_accounts, self.saved, strict=True):
            self.redis.delete(key)
            if saved is not None:
                self.redis.restore(key, 0, saved)

    def flush(self) -> None:
        super().flush()
        self.redis.flushall()


names = st.sampled_from(SIDECARS)

FAULTS = {
    "flush": 0,
    "replicate": 0,
    "no gateway": 0,
    "fail over": 0,
    "fail over to a clock behind": -3_600,
    "fail over to a clock ahead": 3_600,
}
"""With the seconds by which another server's clock is off."""


class AccountsMachine(RuleBasedStateMachine):
    broken: ClassVar[Broken] = KEPT
    draws_type: ClassVar[type[AccountCalls]] = AccountCalls
    bucket_type: ClassVar[type[GrantedBucket]] = GrantedBucket
    make_server: ClassVar[Callable[[Broken], Server]] = Server

    @initialize(limit=st.sampled_from(LIMITS), drifts=st.tuples(*[st.sampled_from([-DRIFT_PPM, 0, DRIFT_PPM])] * 3))
    def begin(self, limit: TokenBucketLimit, drifts: tuple[int, ...]) -> None:
        self.limit = limit
        self.now_us = START_US
        self.server = self.make_server(self.broken)
        self.drifts = dict(zip(SIDECARS, drifts, strict=True))
        self.sidecars = {name: self.new(name) for name in SIDECARS}
        self.members = members_text([{"east": 1}])
        self.under_way: list[Call] = []
        self.lineages = self.histories = 0
        self.has_gateway = True
        self.oracle, self.worst = TextbookBucket(limit), 0
        # It has run for a while, and is full.
        self.pass_time(COUNTED_US + limit.capacity * limit.period_us // limit.tokens + SECOND_US)

    def new(self, name: str) -> Sidecar:
        return Sidecar(name, self.limit, self.drifts[name], self.draws_type, self.bucket_type)

    def take_of(self, name: str, hits: int) -> bool:
        sidecar = self.sidecars[name]
        if not sidecar.bucket.take(hits, sidecar.now_us(self.now_us)):
            return False
        self.worst = max(self.worst, self.oracle.charge(self.now_us, hits))
        return True

    @invariant()
    def nothing_is_admitted_beyond_the_limit(self) -> None:
        if hasattr(self, "worst"):
            assert self.worst <= 0

    @rule(name=names, hits=st.integers(1, 20))
    def take(self, name: str, hits: int) -> None:
        self.take_of(name, hits)

    @rule(name=names, hits=st.sampled_from([1, 50, 2**48]))
    def charge_whatever_is_left(self, name: str, hits: int) -> None:
        if not self.take_of(name, hits):
            sidecar = self.sidecars[name]
            sidecar.bucket.take(hits, sidecar.now_us(self.now_us), always=True)
            assert sidecar.bucket.level >= sidecar.bucket.floor

    @rule()
    def take_all(self) -> None:
        for name in SIDECARS:
            while self.take_of(name, 1):
                pass

    def send(self, name: str, wanted: int | None, most: int, room: int = 0) -> Call | None:
        sidecar = self.sidecars[name]
        now_us = sidecar.now_us(self.now_us)
        sidecar.bucket.advance(now_us)
        needed = draw_needs(sidecar.bucket, now_us) if wanted is None else Needs(wanted, most, room, 2)
        if needed is None:
            return None
        asked = sidecar.draws.ask(sidecar.bucket, needed)
        assert asked is not None
        arguments = [
            each.decode() if isinstance(each, bytes) else each for each in sidecar.draws.arguments([asked], now_us)
        ]
        # One drawn by chance would make the history another one each time.
        self.lineages += 1
        return Call(sidecar, [f"L{self.lineages}", *arguments[1:]], [asked], now_us)

    def hear(self, call: Call) -> None:
        if call.answer is not None:
            call.sidecar.draws.receive(call.asked, call.answer, call.sent_us)

    def call(self, name: str, wanted: int | None = None, most: int = 0, room: int = 0) -> None:
        call = self.send(name, wanted, most, room)
        if call is not None:
            call.answer = self.server.draw(call.arguments, self.now_us)
            self.hear(call)

    @rule(name=names)
    def tick(self, name: str) -> None:
        self.call(name)

    @rule(
        name=names,
        wanted=st.sampled_from([0, 1, 10, 200]),
        most=st.sampled_from([0, 1, 10, 200]),
        room=st.sampled_from([0, 0, 10, 200]),
    )
    def call_whatever_the_policy(self, name: str, wanted: int, most: int, room: int) -> None:
        self.call(name, wanted, most, room)

    @rule()
    def draw_all(self) -> None:
        part = max(1, self.limit.capacity // len(SIDECARS))
        for name in SIDECARS * 2:
            self.call(name, part, 200)

    @rule(name=names, wanted=st.sampled_from([0, 10, 200]), most=st.sampled_from([0, 10, 200]), is_done=st.booleans())
    def call_without_an_answer(self, name: str, wanted: int, most: int, is_done: bool) -> None:
        """What is not done now may be done late, or never."""
        call = self.send(name, wanted, most)
        if call is not None:
            if is_done:
                self.server.draw(call.arguments, self.now_us)
            self.under_way.append(call)

    @rule(which=st.integers(0, 5))
    def a_call_is_done_late_or_again(self, which: int) -> None:
        if which < len(self.under_way):
            self.server.draw(self.under_way[which].arguments, self.now_us)

    @rule(name=names, after_us=st.sampled_from([20_000, SECOND_US, GRANT_US, 2 * COUNTED_US]), is_late=st.booleans())
    def call_that_takes_long(self, name: str, after_us: int, is_late: bool) -> None:
        """Nobody else does anything meanwhile; or they do, and the sidecar was stopped."""
        call = self.send(name, 200, 200)
        assert call is not None
        if is_late:
            self.pass_time(after_us)
        call.answer = self.server.draw(call.arguments, self.now_us)
        if not is_late:
            self.pass_time(after_us)
        self.hear(call)

    @rule(duration_us=st.sampled_from([1_000, BEAT_US, 300_000, SECOND_US, GRANT_US, COUNTED_US, 4 * COUNTED_US]))
    def pass_time(self, duration_us: int) -> None:
        end_us = self.now_us + duration_us
        while self.now_us < end_us:
            self.now_us = min(end_us, self.now_us + BEAT_US)
            if self.has_gateway:
                self.lineages += 1
                self.server.beat(f"L{self.lineages}", self.members, self.now_us)

    @rule(seconds=st.sampled_from([0.05, 0.3, 1, 2.4]))
    def draw_all_and_take_all_later(self, seconds: float) -> None:
        self.draw_all()
        self.pass_time(int(seconds * SECOND_US))
        self.draw_all()
        self.take_all()

    @rule(name=names)
    def what_is_given_back_arrives_late(self, name: str) -> None:
        self.draw_all()
        late = self.send(name, 0, 0)
        assert late is not None
        self.pass_time(2 * COUNTED_US)
        for _ in range(2):
            self.others_draw(name)
            self.take_all()
            for other in SIDECARS:
                if other != name:
                    self.call(other, 0, 0)
        self.server.draw(late.arguments, self.now_us)
        self.others_draw(name)
        self.take_all()

    def others_draw(self, name: str) -> None:
        for _ in range(3):
            for other in SIDECARS:
                if other != name:
                    self.call(other, 200, 200)

    @rule(
        name=names,
        fault=st.sampled_from(["none", "flush", "fail over", "a call is done twice", "no answer"]),
        seconds=st.sampled_from([0.1, 1, 2.4, 7]),
    )
    def one_holds_what_it_drew_before_a_fault_and_others_draw(self, name: str, fault: str, seconds: float) -> None:
        self.server.replicate()
        if "fail" not in fault and fault != "flush":
            self.draw_all()
        self.call(name, 200, 200)
        if fault in ("flush", "fail over"):
            self.server_fault(fault)
        elif fault != "none":
            self.take_of(name, max(1, self.sidecars[name].bucket.held // 2))
            self.call_without_an_answer(name, 0, 200, True)
            if fault == "no answer":
                self.call(name, 0, 200)
            else:
                self.server.draw(self.under_way[-1].arguments, self.now_us)
        self.pass_time(int(seconds * SECOND_US))
        self.others_draw(name)
        self.take_all()

    @rule(name=names)
    def restart(self, name: str) -> None:
        self.sidecars[name] = self.new(name)

    @rule(fault=st.sampled_from(list(FAULTS)))
    def server_fault(self, fault: str) -> None:
        if fault == "flush":
            self.server.flush()
        elif fault == "replicate":
            self.server.replicate()
        elif fault == "no gateway":
            self.has_gateway = not self.has_gateway
        else:
            self.histories += 1
            self.server.become(f"h{self.histories}", FAULTS[fault] * SECOND_US)

    @rule(step_us=st.sampled_from([-3_600 * SECOND_US, -SECOND_US, 128_000, SECOND_US, 3_600 * SECOND_US]))
    def set_the_clock_of_the_server(self, step_us: int) -> None:
        self.server.clock_us += step_us

    @rule(name=names, part=st.sampled_from([1, 2]), is_slower=st.booleans())
    def change_the_limit(self, name: str, part: int, is_slower: bool) -> None:
        """Sidecars change their rules at different moments; the oracle allows the greatest."""
        sidecar, whole = self.sidecars[name], self.limit
        limit = TokenBucketLimit(max(1, whole.tokens // (1 + is_slower)), whole.period_us, whole.capacity // part)
        sidecar.bucket.set_limit(limit, sidecar.now_us(self.now_us))

    @rule(others=st.sampled_from([0, 0, 1]))
    def change_the_members(self, others: int) -> None:
        """The oracle allows the greatest home."""
        self.members = members_text([{"east": 1, "west": others}])


def test_a_call_that_was_refused_is_not_done_later() -> None:
    machine = AccountsMachine()
    machine.begin(TokenBucketLimit(100, SECOND_US, 100), (0, 0, 0))
    machine.change_the_members(0)
    machine.pass_time(1_000)
    machine.call("a", 100, 200)
    machine.call("a", 100, 200)
    assert machine.sidecars["a"].bucket.held == 100
    machine.change_the_members(1)
    machine.pass_time(1_000)
    call = machine.send("a", 0, 0)
    assert call is not None
    call.answer = machine.server.draw(call.arguments, machine.now_us)
    machine.hear(call)
    assert machine.sidecars["a"].bucket.held == 100
    machine.change_the_members(0)
    machine.pass_time(1_000)
    machine.server.draw(call.arguments, machine.now_us)
    machine.others_draw("a")
    machine.take_all()
    machine.nothing_is_admitted_beyond_the_limit()


def test_one_that_nobody_answered_for_long_does_not_empty_the_accounts_of_the_others() -> None:
    """The server has forgotten its caller id by then, as if it had lost data."""
    machine = AccountsMachine()
    machine.begin(TokenBucketLimit(100, SECOND_US, 100), (0, 0, 0))
    machine.call("a", 10, 200)
    machine.call("a", 10, 200)
    for _ in range(3):
        machine.pass_time(CALLER_RENEWED_US // 2)
        machine.send("a", 10, 200)
    machine.server.shard.calls.clear()
    lineage = machine.server.shard.lineage
    machine.call("a", 10, 200)
    assert machine.server.shard.lineage == lineage
    assert machine.sidecars["a"].bucket.held > 0


TestAccountsMachine = AccountsMachine.TestCase
TestAccountsMachine.settings = settings(max_examples=5 * settings().max_examples, stateful_step_count=30)


def machine_on(running: RedisServer) -> type[AccountsMachine]:
    server = type("Running", (ScriptedServer,), {"path": str(running.socket)})
    return type("ScriptedMachine", (AccountsMachine,), {"make_server": server})


@needs_redis
async def test_what_was_granted_counts_in_a_limit_that_is_lowered(tmp_path: Path) -> None:
    async with RedisServer(tmp_path) as running:
        machine = machine_on(running)()
        machine.begin(TokenBucketLimit(100, SECOND_US, 100), (0, 0, 0))
        for name in "ab":
            machine.call(name, 0, 0)
        machine.call("a", 40, 40)
        machine.change_the_limit("b", 2, False)
        machine.call("b", 50, 50)
        assert [machine.sidecars[name].bucket.held for name in "ab"] == [40, 10]


@needs_redis
@pytest.mark.parametrize("program", SERVERS)
async def test_the_scripts_answer_as_the_model_does(tmp_path: Path, program: str) -> None:
    async with RedisServer(tmp_path, program=program) as running:
        machine = machine_on(running)
        fewer = settings(
            max_examples=settings().max_examples // 3, stateful_step_count=20, deadline=None, database=None
        )
        await asyncio.to_thread(run_state_machine_as_test, machine, settings=fewer)


BROKEN: dict[str, dict[str, Any]] = {
    **{each.name: {"broken": Broken(**{each.name: True})} for each in fields(Broken)},
    "spends what has ended": {"bucket_type": Hoarder},
    "ends a grant twice": {"draws_type": Resender},
}


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_without_any_one_rule_a_history_is_found_in_which_more_is_admitted(broken: dict[str, Any]) -> None:
    machine = type("BrokenMachine", (AccountsMachine,), broken)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=1_000, stateful_step_count=20, phases=[Phase.generate], database=None, derandomize=True
            ),
        )
