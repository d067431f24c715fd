"""The accounts of one shard in Python: what the scripts of `fabric/accounts.py` are to do, word for word.

Tests break one rule at a time, by the flags. What the proof rests on besides is in docs/fabric.md.

**The rule.** For one bucket the account has a level L, and counts in `out` what was granted and may still be spent.

1. A call ends the sidecar's former grant and begins one of what it keeps (k) and draws (d): `out` falls by the former
   grant and rises by k + d; L falls by d. What it gives back (b) raises L; `k + b` is at most the former grant.
2. `L + out <= home`: what does not fit is spilled. Refill raises L, never above that.
3. A sidecar spends a grant for 2.5 s by its own clock, from before the call was sent. The account counts it for 3
   to 6 s, from when the call was done.
4. Without an answer the sidecar spends what it held until the former end. Its next call ends nothing, and counts what
   is left again.
5. Calls are numbered. One whose number is not higher than the sidecar's last is refused, so each is done once.
6. The account's clock goes by the server's. Steps back, and steps of more than 0.1 s between two calls, count as no
   time.
7. The lineage of all accounts ends when the server may have lost what it answered: it has no lineage, its
   replication id is another one, or a sidecar knows of a call that it does not. Then accounts are empty, do not refill
   for 3 s, and calls of the former lineage are not done.
8. A bucket without an account has what it can have refilled since those 3 s. A full account with nothing granted is
   dropped, after a change of its limit not before the former one would have refilled it.
9. Only the gateway says who the members are, with its fencing token. Calls that go by others are not done; those of an
   older epoch are not believed. Other regions are shown new members when all shards have known them for 3 s.
10. The gateway is granted room for payments of other regions: `out` rises by it. It is at most `home - L - out`, with
    L no less than zero, and none in the first 3 s of a lineage.

**Proof** that a region admits no more than its home and what that refills. Let `Phi` be L above zero and all that
sidecars hold and may still spend.

- (a) What is held is counted. A token held at `t` was drawn, or counted again, by a call sent at most 2.5 s before.
  That call was done after it was sent, and counts for 3 s of a clock at most 1 % faster than the sidecar's (6; 0.5 %
  for each). A call ends (1) only what the sidecar no longer holds or has counted anew in it, once (5), and only an
  answered grant (4).
- (b) So in one lineage `Phi <= L + out <= home` (2) while L is above zero. Below that only a payment raises Phi, for
  which there is room (10).
- (c) In a new lineage L is at most zero for 3 s, in which all grants of the former one end or are counted again (4).
- (d) A take lowers Phi, a call does not change it, a crash, a loss and an end lower it, and refill raises it by at most
  `rate * dt`. So for any s < t

      admitted in (s, t] <= home + rate * (t - s)

for the region, and for all members as in the proof for purses (docs/algorithm.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha1
from typing import Any

from ratelimit_sidecar.crdt.granted import COUNTED_US
from ratelimit_sidecar.fabric.accounts import KEPT_US, MOST_STEP_US


@dataclass
class Account:
    full: float
    generation: int
    out: int = 0
    former: int = 0
    home: int = 0
    rate: float = 0.0
    used: int = 0


@dataclass(frozen=True)
class Broken:
    """Rules that are not kept."""

    believes_the_clock: bool = False
    believes_the_history: bool = False
    believes_late_calls: bool = False
    keeps_no_room: bool = False
    begins_full: bool = False
    begins_at_once: bool = False
    forgets_grants_at_once: bool = False
    takes_back_what_ended: bool = False
    keeps_the_level_of_a_larger_home: bool = False


KEPT = Broken()


@dataclass
class Shard:
    """What a server has in one shard; a copy of it is what a replica has."""

    broken: Broken = KEPT
    history: str = ""
    lineage: str = ""
    clock: int = 0
    time: int = 0
    members: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)

    @property
    def version(self) -> str:
        return sha1(self.members.encode()).hexdigest() if self.members else ""

    def flush(self) -> None:
        self.history, self.members, self.calls, self.accounts = "", "", {}, {}

    def _begin_lineage(self, lineage: str, history: str, time: int) -> None:
        self.flush()
        self.history, self.lineage, self.clock, self.time = history, lineage, 0, time

    def _begin(self, lineage: str, history: str, time: int) -> None:
        is_known = self.history == history or (self.history and self.broken.believes_the_history)
        if not is_known:
            self._begin_lineage(lineage, history, time)
            return
        step = time - self.time
        if step > 0 and (step <= MOST_STEP_US or self.broken.believes_the_clock):
            self.clock += step
        self.time = time

    def beat(self, lineage: str, members: str, history: str, time: int) -> None:
        """`BEAT`, which looks at all fields."""
        self._begin(lineage, history, time)
        self.members = members
        for name, stored in list(self.accounts.items()):
            account = replace(stored)
            level = self._level_of(account)
            is_full = not account.out + account.former and level >= account.home
            if is_full and self.clock - account.used > KEPT_US:
                del self.accounts[name]

    def draw(self, arguments: Sequence[str], history: str, time: int) -> list[Any] | None:
        """`DRAW`; None for a call that was done before."""
        drawn_lineage, life, number, answered, lineage, version, _, *asked = arguments
        self._begin(drawn_lineage, history, time)
        done = self.calls.get(life, 0)
        if lineage == self.lineage and done < int(answered) and not self.broken.believes_the_history:
            self._begin_lineage(drawn_lineage, history, time)
        if lineage == self.lineage:
            if int(number) <= done and not self.broken.believes_late_calls:
                return None
            self.calls[life] = int(number)
        if lineage != self.lineage or version != self.version or not version:
            return [self.lineage.encode(), self.version.encode(), number.encode(), self.members.encode()]
        texts = [self._draw(name, text) for name, text in zip(asked[::2], asked[1::2], strict=True)]
        return [self.lineage.encode(), self.clock // COUNTED_US, number.encode(), *texts]

    def _level_of(self, account: Account) -> float:
        def spill(until: int) -> None:
            out = 0 if self.broken.keeps_no_room else account.out + account.former
            account.full = max(account.full, until + out / account.rate)

        while account.generation < self.clock // COUNTED_US:
            account.generation += 1
            spill(account.generation * COUNTED_US)
            account.former, account.out = 0 if self.broken.forgets_grants_at_once else account.out, 0
        spill(self.clock)
        return account.home - (account.full - self.clock) * account.rate

    def _draw(self, name: str, text: str) -> bytes:
        words = text.split()
        home, rate = int(words[0]), float(words[1])
        was, ends, kept, back, wanted, room, spared, _ = map(int, words[2:])
        if not home:
            return b"0 0 0 0"
        generation = self.clock // COUNTED_US
        account, used = self.accounts.get(name), self.clock
        if account is not None:
            level = self._level_of(account)
            used = max(used, account.used)
            if (account.home, account.rate) != (home, rate):
                used = max(used, math.ceil(account.full) - KEPT_US)
        else:
            account = Account(0, generation)
            level = max(0, self.clock - (0 if self.broken.begins_at_once else COUNTED_US)) * rate
            if self.broken.begins_full:
                level = home
        if was >= 0:
            counted = {generation: account.out, generation - 1: account.former}.get(was, -1)
            if (counted >= ends and kept + back <= ends) or self.broken.takes_back_what_ended:
                if was == generation:
                    account.out -= ends
                elif was == generation - 1:
                    account.former -= ends
                level += back
            else:
                kept = 0
        account.out += kept
        if self.broken.keeps_no_room:
            level = min(level, home)
        elif not self.broken.keeps_the_level_of_a_larger_home:
            level = min(level, home - account.out - account.former)
        drawn = max(0, min(wanted, math.floor(level)))
        level -= drawn
        account.out += drawn
        free = 0 if self.clock < COUNTED_US else home - max(0, level) - account.out - account.former
        room = max(0, min(room, math.floor(free - min(free / 4, spared))))
        account.out += room
        account.full = self.clock + (home - level) / rate
        if self.clock < COUNTED_US and not (self.broken.begins_at_once or self.broken.begins_full):
            account.full = max(account.full, COUNTED_US + home / rate)
        account.full = float(f"{math.ceil(account.full * 64) / 64:.6f}")
        account.home, account.rate, account.used = home, rate, used
        self.accounts[name] = account
        return f"{kept} {drawn} {room} {max(0, math.floor(level))}".encode()
