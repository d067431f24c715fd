"""A bucket as a hash in Redis: what is written, the script that joins it there, and what is read again.

    {prefix}:1:{bucket key}    at                        when it was last written, by the writers' clocks
                               base                      boundary full period tokens
                               {incarnation} {node id}   what that origin took

All is text, and the 1 the format's version. An origin's slots stand in groups of one kind, `kind number tokens step
tokens step tokens;...`, each number but the first as the distance from the one before. The kind is the exponent, and
`slot.REFUND` more for what was given back.

The script joins as the CRDT does. Counts: the maximum of each slot. Bases: one is two instants, its boundary and when
it would be *full* again. All deficits drain alike, so the later `full` is the larger deficit at any boundary, and
nothing has to be drained. Slots that a new boundary leaves behind are folded into the base. Instants are whole
microseconds, rounded up: a restored level may be lower by what is refilled in one of them.

A writer whose clock is far ahead would have all that others take folded, and refilled, until the time that it believes
in. So the server's clock is asked: such a writer is refused, and a base from such a time is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US, MAX_EXPONENT, MIN_EXPONENT, AnyLimit, TokenBucketLimit, Window
from ratelimit_sidecar.crdt.slot import REFUND, slot_exponent, slot_kind, slot_start_us
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.crdt.token_bucket import SEAL_BATCH_SLOTS
from ratelimit_sidecar.persistence.put_off import AheadOfClock, due_us_of
from ratelimit_sidecar.replication.deltas import MAX_SLOT_TOKENS, MAX_TIME_US
from ratelimit_sidecar.replication.wire import ProtocolError, read_origin

FORMAT: Final = 1

AT: Final = b"at"
BASE: Final = b"base"

_KEPT_WIDTHS: Final = {Window.FIXED: 2, Window.SLIDING: 64}
"""A window's slot is kept for so many of its own widths after its end: as long as any window that has such slots."""

JOIN: Final = """
-- A user who may not ask for the time goes on without.
local is_told, time = pcall(redis.call, 'TIME')
local latest = is_told and time[1] * 1e6 + time[2] + 6e7 or math.huge

local function number(value)
  return string.format('%.0f', value)
end

local function read(text, into)
  for kind, rest in string.gmatch(text, '(%d+) ([^;]+)') do
    local slots = into[kind] or {}
    into[kind] = slots
    local at = 0
    for step, tokens in string.gmatch(rest, '(%d+) (%d+)') do
      at = at + tonumber(step)
      slots[at] = math.max(slots[at] or 0, tonumber(tokens))
    end
  end
  return into
end

local function span_of(kind)
  return 2 ^ (tonumber(kind) % 64)
end

local function write(kinds)
  local groups = {}
  for kind, slots in pairs(kinds) do
    local order = {}
    for at in pairs(slots) do order[#order + 1] = at end
    table.sort(order)
    local parts, last = {kind}, 0
    for _, at in ipairs(order) do
      parts[#parts + 1] = number(at - last)
      parts[#parts + 1] = number(slots[at])
      last = at
    end
    if #order > 0 then groups[#groups + 1] = table.concat(parts, ' ') end
  end
  table.sort(groups)
  return table.concat(groups, ';')
end

local function join(key, told)
  local head, body = string.match(told, '^([^\\n]*)\\n(.*)$')
  local numbers = {}
  for word in string.gmatch(head, '%S+') do numbers[#numbers + 1] = tonumber(word) end
  local now, ttl, boundary, batch, full, period, rate, exponent, ceiling, kept = unpack(numbers)
  if now > latest then return 'CLOCKAHEAD' end
  if boundary > latest then boundary, full = 0, 0 end
  local was = redis.call('HMGET', key, 'at', 'base')
  local at, old_boundary, old_full = now, 0, 0
  if was[1] then
    at = math.max(now, tonumber(was[1]))
    local old = {}
    for word in string.gmatch(was[2], '%S+') do old[#old + 1] = tonumber(word) end
    old_boundary, old_full = old[1], old[2]
    if old_full > old_boundary and period > 0 and (old[3] ~= period or old[4] ~= rate) then
      -- Another limit: the deficit in tokens stays.
      old_full = old_boundary + (old_full - old_boundary) * (old[4] * period) / (old[3] * rate)
    end
    if old_boundary > latest then old_boundary, old_full = 0, 0 end
  end
  local seals = boundary - old_boundary >= batch
  local origins, changed = {}, {}
  if seals and was[1] then
    local all = redis.call('HGETALL', key)
    for i = 1, #all, 2 do
      if all[i] ~= 'at' and all[i] ~= 'base' then origins[all[i]] = read(all[i + 1], {}) end
    end
  end
  for origin, text in string.gmatch(body, '([^\\n\\t]+)\\t([^\\n]+)\\n') do
    if not origins[origin] then
      local stored = not seals and was[1] and redis.call('HGET', key, origin)
      origins[origin] = stored and read(stored, {}) or {}
    end
    local news = read(text, {})
    for kind, slots in pairs(news) do
      local mine = origins[origin][kind] or {}
      origins[origin][kind] = mine
      for slot, tokens in pairs(slots) do
        -- What began before a base is in it.
        if period == 0 or slot * span_of(kind) >= old_boundary then
          mine[slot] = math.max(mine[slot] or 0, tokens)
          changed[origin] = true
        end
      end
    end
  end
  local new_boundary, new_full = old_boundary, old_full
  if seals then
    new_boundary = boundary
    local events = {}
    for origin, kinds in pairs(origins) do
      for kind, slots in pairs(kinds) do
        local span = span_of(kind)
        for slot, tokens in pairs(slots) do
          local start = slot * span
          local is_past
          if period > 0 then
            is_past = start < boundary
            if is_past then
              local placed = start + math.floor(math.min(span, 2 ^ exponent) / 2)
              events[#events + 1] = {math.min(placed, boundary - 1), tonumber(kind) < 64 and tokens or -tokens}
            end
          else
            is_past = start + span + kept * span <= now
          end
          if is_past then
            slots[slot] = nil
            changed[origin] = true
          end
        end
      end
    end
    table.sort(events, function(a, b) return a[1] < b[1] or a[1] == b[1] and a[2] > b[2] end)
    local last
    for _, event in ipairs(events) do
      -- After what was given back in the slot: what was held and given back is no debt.
      if last and event[1] > last then new_full = math.min(new_full, last + ceiling) end
      last = event[1]
      new_full = math.max(last, math.max(new_full, last) + event[2] * period / rate)
    end
    if last then new_full = math.min(new_full, last + ceiling) end
  end
  if seals or boundary <= old_boundary then new_full = math.max(new_full, full) end
  new_full = math.ceil(new_full)
  local base = number(new_boundary) .. ' ' .. number(new_full) .. ' ' .. number(period) .. ' ' .. number(rate)
  local fields = {'at', number(at), 'base', base}
  for origin in pairs(changed) do
    local text = write(origins[origin])
    if text == '' then
      redis.call('HDEL', key, origin)
    else
      fields[#fields + 1] = origin
      fields[#fields + 1] = text
    end
  end
  -- Lua unpacks some 8,000 at once.
  for i = 1, #fields, 1000 do redis.call('HSET', key, unpack(fields, i, math.min(i + 999, #fields))) end
  if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, ttl) end
  return was[1] and 0 or 1
end

local answers = {}
for i, key in ipairs(KEYS) do
  local is_done, answer = pcall(join, key, ARGV[i])
  if not is_done then answer = type(answer) == 'table' and answer.err or tostring(answer) end
  answers[i] = answer
end
return answers
"""
"""KEYS are buckets, ARGV what is told of each (`tell`). Answers for each 1 when there was none, 0 when there was, or a
text, why it could not be joined."""

READ: Final = """
local answers = {}
for i, key in ipairs(KEYS) do
  local is_hash, fields = pcall(redis.call, 'HGETALL', key)
  answers[i] = is_hash and table.concat(fields, '\\n') or 'none'
end
return answers
"""
"""KEYS are buckets. Answers for each fields and values in lines, for `restore_steps`: lists are read more slowly."""


class Keys:
    """The names of one deployment's keys.

    Args:
        prefix: letters, digits and _ . : - only.
        shards: tags of keys that are spread over the nodes of a Cluster.
    """

    def __init__(self, prefix: str, shards: Sequence[str] = ()) -> None:
        self.formats: Final = [f"{prefix}:format", *[f"{prefix}:format:{{{tag}}}" for tag in shards]]
        """Each holds the format's version and, after a space, what changes when its server has lost its data."""
        self._head: Final = f"{prefix}:{FORMAT}:{{".encode()
        self.pattern: Final = self._head + b"*}"
        """For SCAN."""

    def of_bucket(self, key: bytes) -> bytes:
        # In braces: of a Cluster's hash tag a bucket has one of its own, whatever is in front.
        return self._head + key + b"}"

    def bucket(self, name: bytes) -> bytes | None:
        """The bucket's key; None when it is no bucket's."""
        if not name.startswith(self._head) or not name.endswith(b"}"):
            return None
        return name[len(self._head) : -1]


class BadRecord(Exception):
    """What Redis has, or answers, is no bucket's state; the text says why."""


def is_worth_keeping(limit: AnyLimit, every_us: int) -> bool:
    """Whether a limit is worth writing: False when all of it refills before the next write."""
    if isinstance(limit, TokenBucketLimit):
        return limit.scaled_capacity // limit.tokens > every_us
    return limit.period_us > every_us


def join_text(bucket: Bucket, lines: Iterable[str], now_us: int) -> bytes:
    """The text for `JOIN`: some entries of the bucket, and its base.

    Args:
        lines: `entry_lines` of the entries. The bucket may have changed since: what was sealed is in the base as well.
    """
    bucket.advance(now_us)
    limit = bucket.limit
    ttl_us = bucket.full_in_us + MAX_AHEAD_US
    if isinstance(limit, TokenBucketLimit):
        ttl_us += limit.horizon_us
        base = bucket.base
        full_us = base.boundary_us - (-base.deficit // limit.tokens)
        ceiling_us = -(-limit.debt_ceiling // limit.tokens)
        batch_us = SEAL_BATCH_SLOTS << limit.exponent
        of_limit: tuple[int, ...] = (
            base.boundary_us, batch_us, full_us, limit.period_us, limit.tokens, limit.exponent, ceiling_us, 0
        )  # fmt: skip
    else:
        # Past slots are looked for once a window, or once in a quarter to half of a sliding one.
        batch_us = (1 if limit.window is Window.FIXED else SEAL_BATCH_SLOTS) << limit.exponent
        of_limit = (now_us, batch_us, 0, 0, 0, limit.exponent, 0, _KEPT_WIDTHS[limit.window])
    head = " ".join(map(str, (now_us, ttl_us // 1_000, *of_limit)))
    return ("\n".join([head, *lines]) + "\n").encode()


def entry_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """Entries as lines for `join_text`, one for each origin."""
    counts: dict[Origin, dict[int, list[tuple[int, int]]]] = {}
    for origin, slot, tokens in entries:
        number = slot_start_us(slot) >> slot_exponent(slot)
        counts.setdefault(origin, {}).setdefault(slot_kind(slot), []).append((number, min(tokens, MAX_SLOT_TOKENS)))
    for origin, kinds in counts.items():
        if any(char in origin.node for char in "\n\t"):
            # No name that a configuration can give; a peer may have made it up.
            continue
        groups = []
        for kind, numbers in sorted(kinds.items()):
            numbers.sort()
            parts = [kind]
            last = 0
            for number, tokens in numbers:
                parts += (number - last, tokens)
                last = number
            groups.append(" ".join(map(str, parts)))
        yield f"{origin.incarnation:x} {origin.node}\t{';'.join(groups)}"


_ORIGIN: Final = re.compile(rb"([0-9a-f]{1,16}) (.+)", re.DOTALL)


def restore_steps(
    key: bytes, limit: AnyLimit, lines: bytes, store: Store, now_us: int, *, ahead: AheadOfClock
) -> Iterator[None]:
    """Join what `READ` answers of one bucket, in steps; yields after each.

    Args:
        ahead: notes the bucket if it is ahead of the clock.

    Raises:
        BadRecord: it is malformed; nothing of it has been joined.
    """
    words = lines.split(b"\n")
    record = dict(zip(words[::2], words[1::2], strict=False))
    entries: list[Entry] = []
    try:
        _bounded(int(record.pop(AT)), MAX_TIME_US)
        base = read_base(record.pop(BASE), limit)
        # That of a window says when slots were dropped last, and is not joined.
        due_us = due_us_of(base.boundary_us, ()) if isinstance(limit, TokenBucketLimit) else 0
        for field, text in record.items():
            told = _entries(_origin(field), text)
            due_us = max(due_us, due_us_of(0, told))
            entries += told
            yield
    except (KeyError, ValueError, ProtocolError) as error:
        raise BadRecord(str(error)) from error
    if due_us > now_us:
        ahead.note(due_us)
    yield from store.restore(key, limit, base, entries, now_us)


def _origin(field: bytes) -> Origin:
    match = _ORIGIN.fullmatch(field)
    if match is None:
        raise ValueError("a field that is no origin")
    return read_origin(match[2].decode(), int(match[1], 16))


def _entries(origin: Origin, text: bytes) -> Sequence[Entry]:
    entries = []
    for group in text.split(b";"):
        kind, *numbers = map(int, group.split(b" "))
        exponent = slot_exponent(kind)
        if kind >= 2 * REFUND or not MIN_EXPONENT <= exponent <= MAX_EXPONENT or len(numbers) % 2:
            raise ValueError("malformed slots")
        number = 0
        for step, tokens in zip(numbers[::2], numbers[1::2], strict=True):
            number = _bounded(number + step, MAX_TIME_US >> exponent)
            if not 1 <= tokens <= MAX_SLOT_TOKENS:
                raise ValueError("a count out of its range")
            entries.append(Entry(origin, number << exponent | kind, tokens))
    return entries


def read_base(text: bytes, limit: AnyLimit) -> Base:
    """The base, for the period of `limit`; rounded up, so that no debt is lost."""
    boundary_us, full_us, period_us, tokens = map(int, text.split(b" "))
    _bounded(boundary_us, MAX_TIME_US)
    if period_us <= 0 or tokens <= 0 or full_us <= boundary_us:
        return Base(boundary_us, 0)
    return Base(boundary_us, -(-(full_us - boundary_us) * tokens * limit.period_us // period_us))


def _bounded(number: int, maximum: int) -> int:
    if not 0 <= number <= maximum:
        raise ValueError("a number out of its range")
    return number
