"""A bucket on the fabric, the scripts that work on it, and what they are asked and answer. No I/O.

    {prefix}:fabric1:clock        epoch     drawn when there was none: another one means that the server lost its data
                                  version   one more at each call
    {prefix}:fabric1:changed      every bucket with the version at which a sidecar here raised it last
    {prefix}:fabric1:lease        who the gateway is, and its token
    {prefix}:fabric1:token        the last one given
    {prefix}:fabric1:b:{key}      o{incarnation} {node}   what that sidecar took: slot ids and counts, as MessagePack
                                  s{slot id}              the sum of these, and what other regions took
                                  base                    boundary full period tokens (`persistence.redis_record`)
    {prefix}:fabric1:i:{key}      its slots, with the version at which their sum changed last

What was given back in a window is no sum: each says how much it is in all, and the most counts.

Counts only grow, and a script raises a sum by as much as it raises a count: so all of it may be told again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US, MAX_EXPONENT, MIN_EXPONENT, AnyLimit, Limit, Window
from ratelimit_sidecar.crdt.slot import REFUND, slot_exponent, slot_start_us
from ratelimit_sidecar.crdt.token_bucket import SEAL_BATCH_SLOTS
from ratelimit_sidecar.persistence.redis_record import BadRecord, read_base
from ratelimit_sidecar.replication.deltas import MAX_SLOT_TOKENS, MAX_TIME_US

VERSION: Final = 1

OTHERS: Final = Origin("fabric", 1)
"""Whose counts the others' are, in a sidecar's store."""

_KEPT_WIDTHS: Final = {Window.FIXED: 3, Window.SLIDING: 65}
"""For so many of its own widths a window's slot is kept."""

_COMMON: Final = """
local function version_now(clock, drawn)
  if redis.call('HSETNX', clock, 'epoch', drawn) == 1 then redis.call('HSETNX', clock, 'version', 0) end
  return redis.call('HGET', clock, 'epoch'), redis.call('HINCRBY', clock, 'version', 1)
end

local function words_of(text)
  local words = {}
  for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
  return words
end

local function sums_of(key, slot)
  local here, elsewhere = string.match(redis.call('HGET', key, 's' .. slot) or '0 0', '(%d+) (%d+)')
  return tonumber(here), tonumber(elsewhere)
end

local function is_refund(slot)
  return math.floor(slot / 64) % 2 == 1
end

local function write_sums(key, index, version, slot, here, elsewhere)
  redis.call('HSET', key, 's' .. slot, string.format('%.0f %.0f', here, elsewhere))
  redis.call('ZADD', index, version, slot)
end

local function join_base(key, boundary, full, period, rate)
  local text = redis.call('HGET', key, 'base')
  if text then
    local old = words_of(text)
    local old_boundary, old_full = tonumber(old[1]), tonumber(old[2])
    if old[3] ~= period or old[4] ~= rate then
      -- Another limit: the deficit in tokens stays.
      old_full = old_boundary + (old_full - old_boundary) * (old[4] * period) / (old[3] * rate)
    end
    boundary, full = math.max(boundary, old_boundary), math.max(full, old_full)
  end
  if full > boundary then
    local joined = string.format('%.0f %.0f %s %s', boundary, math.ceil(full), period, rate)
    if joined ~= text then redis.call('HSET', key, 'base', joined) end
    text = joined
  end
  return text
end

local function keep(key, index, ttl, oldest, version)
  for _, name in ipairs({key, index}) do
    if redis.call('PTTL', name) < ttl then redis.call('PEXPIRE', name, ttl) end
  end
  for _, slot in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    if tonumber(slot) < oldest then
      redis.call('ZREM', index, slot)
      redis.call('HDEL', key, 's' .. slot)
    end
  end
  if version % 1024 == 0 then
    -- Of sidecars that have gone.
    local all = redis.call('HGETALL', key)
    for i = 1, #all, 2 do
      if string.sub(all[i], 1, 1) == 'o' then
        local newest = 0
        for slot in pairs(cmsgpack.unpack(all[i + 1])) do newest = math.max(newest, slot) end
        if newest < oldest then redis.call('HDEL', key, all[i]) end
      end
    end
  end
end
"""

SHARE: Final = (
    _COMMON
    + """
local epoch, version = version_now(KEYS[1], ARGV[1])
local field = 'o' .. ARGV[2]
local answers = {epoch, version}
for i = 3, #ARGV do
  local key, index = KEYS[2 * i - 3], KEYS[2 * i - 2]
  local asked = words_of(ARGV[i])
  local seen, is_window = asked[1], asked[6] == '0'
  local own, fields, sums = nil, {}, {}
  if #asked > 7 then
    local packed = redis.call('HGET', key, field)
    own = packed and cmsgpack.unpack(packed) or {}
    for at = 8, #asked, 2 do
      local slot, count = tonumber(asked[at]), tonumber(asked[at + 1])
      local before = own[slot] or 0
      if count > before then
        local here, elsewhere = sums_of(key, asked[at])
        here = is_window and is_refund(slot) and math.max(here, count) or here + count - before
        own[slot] = count
        sums[asked[at]] = {here, elsewhere}
        fields[#fields + 1] = 's' .. asked[at]
        fields[#fields + 1] = string.format('%.0f %.0f', here, elsewhere)
        redis.call('ZADD', index, version, asked[at])
      end
    end
    if #fields > 0 then
      redis.call('ZADD', KEYS[2], version, string.sub(key, #KEYS[1] - 1, -2))
      local oldest = tonumber(asked[3])
      if not packed or version % 16 == 0 then
        for slot in pairs(own) do
          if slot < oldest then own[slot] = nil end
        end
      end
      fields[#fields + 1] = field
      fields[#fields + 1] = cmsgpack.pack(own)
      redis.call('HSET', key, unpack(fields))
      -- After the first write: what is not there does not expire.
      if not packed or version % 16 == 0 then keep(key, index, tonumber(asked[2]), oldest, version) end
    end
  end
  local base = ''
  if not is_window then
    base = join_base(key, tonumber(asked[4]), tonumber(asked[5]), asked[6], asked[7]) or ''
  end
  local changed, others = redis.call('ZRANGEBYSCORE', index, '(' .. seen, '+inf'), {}
  if #changed > 0 and not own then
    local packed = redis.call('HGET', key, field)
    own = packed and cmsgpack.unpack(packed) or {}
  end
  for _, slot in ipairs(changed) do
    local here, elsewhere
    if sums[slot] then here, elsewhere = sums[slot][1], sums[slot][2] else here, elsewhere = sums_of(key, slot) end
    local sum = here - (own[tonumber(slot)] or 0) + elsewhere
    if is_window and is_refund(tonumber(slot)) then sum = math.max(here, elsewhere) end
    if sum > 0 then
      others[#others + 1] = slot
      others[#others + 1] = string.format('%.0f', sum)
    end
  end
  answers[#answers + 1] = base .. ';' .. table.concat(others, ' ')
end
return answers
"""
)
"""KEYS: clock, changed, and two of each bucket. ARGV: an epoch if there is none, the origin's field, `ask` for each.
Answers the epoch, the version, and for each `base;slot count slot count`."""

GATEWAY: Final = (
    _COMMON
    + """
if redis.call('GET', KEYS[3]) ~= ARGV[2] then return redis.error_reply('FENCED another gateway has the lease') end
local epoch, version = version_now(KEYS[1], ARGV[1])
local since, prefix, most = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
for i = 6, #ARGV do
  local key, index = KEYS[2 * i - 8], KEYS[2 * i - 7]
  local told = words_of(ARGV[i])
  local is_changed = false
  for at = 3, #told, 2 do
    local here, elsewhere = sums_of(key, told[at])
    if tonumber(told[at + 1]) > elsewhere then
      write_sums(key, index, version, told[at], here, tonumber(told[at + 1]))
      is_changed = true
    end
  end
  if is_changed then keep(key, index, tonumber(told[1]), tonumber(told[2]), version) end
end
local found = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[3], '+inf', 'WITHSCORES', 'LIMIT', 0, most)
local until_version, count = version, #found / 2
if count == most then
  -- Those that one call raised stay together: it raises fewer than these.
  until_version = tonumber(found[#found]) - 1
  while count > 0 and tonumber(found[2 * count]) > until_version do count = count - 1 end
end
local answers = {epoch, until_version, version}
for i = 1, count do
  local name = found[2 * i - 1]
  local key, index = prefix .. 'b:{' .. name .. '}', prefix .. 'i:{' .. name .. '}'
  local sums = {}
  for _, slot in ipairs(redis.call('ZRANGEBYSCORE', index, '(' .. ARGV[3], '+inf')) do
    local here = sums_of(key, slot)
    if here > 0 then
      sums[#sums + 1] = slot
      sums[#sums + 1] = string.format('%.0f', here)
    end
  end
  answers[#answers + 1] = name
  answers[#answers + 1] = (redis.call('HGET', key, 'base') or '') .. ';' .. table.concat(sums, ' ')
end
for _ = 1, 8 do
  -- What has expired is left out of the index now and then.
  local name = redis.call('ZRANDMEMBER', KEYS[2])
  if name and redis.call('EXISTS', prefix .. 'b:{' .. name .. '}') == 0 then redis.call('ZREM', KEYS[2], name) end
end
return answers
"""
)
"""KEYS: clock, changed, lease, and two of each bucket that other regions took from. ARGV: an epoch if there is none,
who holds the lease and its token, the version seen, what keys begin with, most buckets to answer, `elsewhere` for each.
Answers the epoch, the version up to which these are all, the present one, and for each bucket its key and what
sidecars of this region took: `base;slot count slot count`."""

LEASE: Final = """
local holder = redis.call('GET', KEYS[1])
if not holder then
  local token = redis.call('INCR', KEYS[2])
  redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. token, 'PX', ARGV[2])
  return token
end
local id, token = string.match(holder, '^(.*) (%d+)$')
if id ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return tonumber(token)
"""
"""KEYS: lease, token. ARGV: who asks for it, and for how many milliseconds. Answers its token, or 0: another has it."""

GIVE_UP: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class FabricKeys:
    """Args:
    prefix: letters, digits and _ . : - only.
    """

    def __init__(self, prefix: str) -> None:
        self.head: Final = f"{prefix}:fabric{VERSION}:".encode()
        self.clock: Final = self.head + b"clock"
        self.changed: Final = self.head + b"changed"
        self.lease: Final = self.head + b"lease"
        self.token: Final = self.head + b"token"

    def of_bucket(self, key: bytes) -> tuple[bytes, bytes]:
        """The hash, and the index of its slots."""
        return self.head + b"b:{" + key + b"}", self.head + b"i:{" + key + b"}"


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer says of one bucket."""

    base: Base | None
    entries: list[Entry]


def field_of(origin: Origin) -> str:
    return f"{origin.incarnation:x} {origin.node}"


def ask(bucket: Bucket, entries: Iterable[Entry], seen: int, now_us: int) -> bytes:
    """For `SHARE`: these own entries have changed; the others' are wanted that have since version `seen`."""
    limit = bucket.limit
    base = "0 0 0 0"
    if isinstance(limit, Limit):
        boundary_us, deficit = bucket.base.boundary_us, bucket.base.deficit
        base = f"{boundary_us} {boundary_us - (-deficit // limit.tokens)} {limit.period_us} {limit.tokens}"
    ttl_ms, oldest_us = _kept(bucket, now_us)
    return f"{seen} {ttl_ms} {oldest_us} {base}".encode() + _counts(entries)


def elsewhere(bucket: Bucket, here: Origin, now_us: int) -> bytes:
    """For `GATEWAY`: what others than `here` took, all together."""
    sums: dict[int, int] = {}
    for origin, slot, tokens in bucket.entries():
        if origin != here:
            known = sums.get(slot, 0)
            is_most = slot & REFUND and not isinstance(bucket.limit, Limit)
            sums[slot] = max(known, tokens) if is_most else known + tokens
    ttl_ms, oldest_us = _kept(bucket, now_us)
    return f"{ttl_ms} {oldest_us}".encode() + _counts(Entry(here, slot, count) for slot, count in sums.items())


def read(text: bytes, limit: AnyLimit, origin: Origin) -> Told:
    """Part of an answer, as counts of `origin`.

    Raises:
        BadRecord: it is none.
    """
    base, _, counts = text.partition(b";")
    numbers = [int(word) for word in counts.split()]
    entries = [
        Entry(origin, slot, min(count, MAX_SLOT_TOKENS))
        for slot, count in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    for _, slot, count in entries:
        if not (MIN_EXPONENT <= slot_exponent(slot) <= MAX_EXPONENT and 0 <= slot_start_us(slot) <= MAX_TIME_US):
            raise BadRecord("a slot that is none")
        if count < 1:
            raise BadRecord("a count that is none")
    return Told(read_base(base, limit) if base and isinstance(limit, Limit) else None, entries)


def _kept(bucket: Bucket, now_us: int) -> tuple[int, int]:
    """For how many milliseconds the bucket counts, and since when its slots do."""
    bucket.advance(now_us)
    limit = bucket.limit
    ttl_us = bucket.full_in_us + MAX_AHEAD_US
    if isinstance(limit, Limit):
        # A replica whose base is behind still asks for what it has not folded.
        oldest_us = bucket.base.boundary_us - 2 * (SEAL_BATCH_SLOTS << limit.exponent)
        ttl_us += limit.horizon_us
    else:
        oldest_us = now_us - (_KEPT_WIDTHS[limit.window] << limit.exponent)
    return ttl_us // 1_000, max(0, oldest_us)


def _counts(entries: Iterable[Entry]) -> bytes:
    return "".join(f" {slot} {min(tokens, MAX_SLOT_TOKENS)}" for _, slot, tokens in entries).encode()


def pairs(keys: FabricKeys, buckets: Sequence[Bucket]) -> list[bytes]:
    """The keys of these, for `SHARE` and `GATEWAY`."""
    return [name for bucket in buckets for name in keys.of_bucket(bucket.key)]
