"""The keys of a fabric and the scripts that work on them. No I/O.

The keys are divided into shards: one, or in a Cluster several, each with a hash tag of its own. All names of a shard
begin with `{prefix}:fabric1:{TAG}:`, where 1 is the format's version:

    clock        epoch     drawn when there was none; another one means that the server lost its data
                 version   one more at each call
    changed      the buckets that a sidecar here raised, with the version of the latest time
    lease        who the gateway is; in the first shard
    fence        the highest token of a gateway that called
    strict       the accounts of strict limits: `accounts.py`; so is `short`
    b:KEY        id                     EPOCH:VERSION of its creation; what is of another epoch counts as absent
                 keep                   span until mark: see below
                 base                   boundary full period tokens, as in `persistence.redis_record`
                 o{life}                what that life of a sidecar took: slot ids and counts, as MessagePack
                 s{slot}                "here elsewhere": the sum of these counts, and what other regions took
    i:KEY        the bucket's slots, with the version at which their sum changed last

Counts only grow, and a script raises a sum by as much as it raises a count, so all of it may be told again. What was
given back in a window is no sum: each tells how much it is in all, and the highest one counts.

A slot is dropped once it is older than the longest span for which anybody who writes to the bucket counts it; so it
does not matter if some of them still have another limit. `keep` has
that span, until when it holds, and the number of slots at which old ones are looked for.

A bucket that cannot be read costs that bucket only: its answer is `!` and the error.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

VERSION: Final = 1

MAX_SLOTS: Final = 1_024
"""Of one bucket; of more, as when limits of a second and of a month run side by side, the oldest are dropped."""

_COMMON: Final = (
    f"""
local MAX_SLOTS = {MAX_SLOTS}
local MAX_PACKED = 65536
"""
    + """

local function begin(clock, changed, drawn)
  local epoch = redis.call('HGET', clock, 'epoch')
  if not epoch or not redis.call('ZSCORE', changed, '@') then
    epoch = drawn
    redis.call('DEL', changed)
    redis.call('HSET', clock, 'epoch', epoch)
    redis.call('ZADD', changed, 0, '@')
  end
  return epoch, redis.call('HINCRBY', clock, 'version', 1)
end

local function words_of(text)
  local words = {}
  for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
  return words
end

local function number(value)
  return string.format('%.0f', value)
end

local function is_refund(slot)
  return math.floor(slot / 64) % 2 == 1
end

local function sums_in(text)
  if not text then return end
  local here, elsewhere = string.match(text, '^(%d+) (%d+)$')
  return tonumber(here), tonumber(elsewhere)
end

local function sums_of(key, slot)
  return sums_in(redis.call('HGET', key, 's' .. slot))
end

local function life_of(epoch, id, index)
  -- How long it lives on, in milliseconds; nil when it is absent. Both keys have to be there.
  if not id or string.sub(id, 1, #epoch + 1) ~= epoch .. ':' then return end
  local life = redis.call('PTTL', index)
  return life ~= -2 and life or nil
end

local function create(key, index, epoch, version)
  redis.call('DEL', key, index)
  local id = epoch .. ':' .. number(version)
  redis.call('HSET', key, 'id', id)
  redis.call('ZADD', index, 0, '@')
  return id
end

local function dropping(key, keep, span, now)
  -- Returns since when slots are kept, and `keep` as it is to be.
  local kept, till, mark = string.match(keep or '', '^(%d+) (%d+) (%d+)$')
  kept, till, mark = tonumber(kept or 0), tonumber(till or 0), tonumber(mark or 64)
  if span >= kept or till < now then
    kept = span
    if till < now + span then till = now + 2 * span end
  end
  return now - kept, {kept, till, mark}
end

local function write(key, index, fields, news, keep_text, keep, oldest)
  -- Only a slot that is new makes them more.
  local is_many = redis.call('ZADD', index, unpack(news)) > 0 and redis.call('ZCARD', index) > keep[3]
  local text = number(keep[1]) .. ' ' .. number(keep[2]) .. ' ' .. number(keep[3])
  if text ~= keep_text then
    fields[#fields + 1] = 'keep'
    fields[#fields + 1] = text
  end
  redis.call('HSET', key, unpack(fields))
  if not is_many then return end
  local left = {}
  for _, slot in ipairs(redis.call('ZRANGEBYSCORE', index, '(0', '+inf')) do left[#left + 1] = slot end
  table.sort(left, function(a, b) return tonumber(a) > tonumber(b) end)
  local count = 0
  for i, slot in ipairs(left) do
    if i > MAX_SLOTS or tonumber(slot) < oldest then
      redis.call('ZREM', index, slot)
      redis.call('HDEL', key, 's' .. slot)
    else
      count = i
    end
  end
  redis.call('HSET', key, 'keep', number(keep[1]) .. ' ' .. number(keep[2]) .. ' ' .. number(2 * count + 16))
  -- Of sidecars that have gone.
  for _, field in ipairs(redis.call('HRANDFIELD', key, 8)) do
    if string.sub(field, 1, 1) == 'o' and redis.call('HSTRLEN', key, field) <= MAX_PACKED then
      local newest = 0
      for slot in pairs(cmsgpack.unpack(redis.call('HGET', key, field))) do newest = math.max(newest, slot) end
      if newest < oldest then redis.call('HDEL', key, field) end
    end
  end
end

local function live_on(key, index, life, ttl)
  if life < ttl then
    -- Not at each call: a quarter more.
    local longer = number(ttl + math.floor(ttl / 4))
    redis.call('PEXPIRE', key, longer)
    redis.call('PEXPIRE', index, longer)
  end
end

local function joined_base(text, boundary, full, period, rate)
  if text then
    local old = words_of(text)
    local old_boundary, old_full = tonumber(old[1]), tonumber(old[2])
    if old[3] ~= period or old[4] ~= rate then
      -- Another limit: the deficit in tokens stays.
      old_full = old_boundary + (old_full - old_boundary) * (old[4] * period) / (old[3] * rate)
    end
    boundary, full = math.max(boundary, old_boundary), math.max(full, old_full)
  end
  if full > boundary then return number(boundary) .. ' ' .. number(math.ceil(full)) .. ' ' .. period .. ' ' .. rate end
end

local function error_of(failure)
  return '!' .. string.sub(type(failure) == 'table' and failure.err or tostring(failure), 1, 200)
end

local function server_now()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end
"""
)

SHARE: Final = (
    _COMMON
    + """
local epoch, version = begin(KEYS[1], KEYS[2], ARGV[1])
local field, now_here = 'o' .. ARGV[2], server_now()

local function share(key, index, name, told)
  local asked = words_of(told)
  local seen, ttl, is_window = asked[1], tonumber(asked[2]), asked[7] == '0'
  local wanted = {'id', 'base', 'keep', field}
  for at = 9, #asked, 2 do wanted[#wanted + 1] = 's' .. asked[at] end
  local found = redis.call('HMGET', key, unpack(wanted))
  local life = life_of(epoch, found[1], index)
  if not life then found, seen = {}, '0' end
  local id, base, keep_text, packed = found[1], found[2], found[3], found[4]
  local own = {}
  if packed then
    if #packed > MAX_PACKED then error('a field that is too long') end
    own = cmsgpack.unpack(packed)
  end
  local joined = not is_window and joined_base(base, tonumber(asked[5]), tonumber(asked[6]), asked[7], asked[8])
  if not id and (joined or #asked > 8) then id, life = create(key, index, epoch, version), -1 end
  if joined and joined ~= base then
    redis.call('HSET', key, 'base', joined)
    base = joined
  end
  local sums = {}
  if #asked > 8 then
    local fields, news = {}, {}
    local now = math.min(now_here, tonumber(asked[4]))
    local oldest, keep = dropping(key, keep_text, tonumber(asked[3]), now)
    for at = 9, #asked, 2 do
      local slot, count = tonumber(asked[at]), tonumber(asked[at + 1])
      local here, elsewhere = sums_in(found[(at - 9) / 2 + 5])
      local before = here and own[slot] or 0
      if count > before and slot >= oldest then
        here, elsewhere = here or 0, elsewhere or 0
        here = is_window and is_refund(slot) and math.max(here, count) or here + count - before
        own[slot] = count
        sums[asked[at]] = {here, elsewhere}
        fields[#fields + 1] = 's' .. asked[at]
        fields[#fields + 1] = number(here) .. ' ' .. number(elsewhere)
        news[#news + 1] = version
        news[#news + 1] = asked[at]
      end
    end
    if #fields > 0 then
      local count = 0
      for slot in pairs(own) do
        if slot < oldest then own[slot] = nil else count = count + 1 end
      end
      if count > MAX_SLOTS then
        local slots = {}
        for slot in pairs(own) do slots[#slots + 1] = slot end
        table.sort(slots)
        for i = 1, count - MAX_SLOTS do own[slots[i]] = nil end
      end
      fields[#fields + 1] = field
      fields[#fields + 1] = cmsgpack.pack(own)
      redis.call('ZADD', KEYS[2], version, name)
      write(key, index, fields, news, keep_text, keep, oldest)
    end
  end
  if not id then return ';;' end
  live_on(key, index, life, ttl)
  local others = {}
  for _, slot in ipairs(redis.call('ZREVRANGEBYSCORE', index, number(version), '(' .. seen, 'LIMIT', 0, MAX_SLOTS)) do
    local here, elsewhere
    if sums[slot] then here, elsewhere = sums[slot][1], sums[slot][2] else here, elsewhere = sums_of(key, slot) end
    if here then
      local sum = here - (own[tonumber(slot)] or 0) + elsewhere
      if is_window and is_refund(tonumber(slot)) then sum = math.max(here, elsewhere) end
      if sum > 0 then
        others[#others + 1] = slot
        others[#others + 1] = number(sum)
      end
    end
  end
  return id .. ';' .. (base or '') .. ';' .. table.concat(others, ' ')
end

local answers = {epoch, version}
local head = #ARGV[3]
for i = 4, #ARGV do
  local key, index = KEYS[2 * i - 5], KEYS[2 * i - 4]
  local is_done, answer = pcall(share, key, index, string.sub(key, head + 1), ARGV[i])
  answers[#answers + 1] = is_done and answer or error_of(answer)
end
return answers
"""
)
"""KEYS: clock, changed, and two of each bucket. ARGV: an epoch if there is none, the name of this life, the common head
of the buckets' names, `record.ask` for each. Answers the epoch, the version, and for each
`id;base;slot count slot count`."""

GATEWAY: Final = (
    _COMMON
    + """
local fence = tonumber(redis.call('GET', KEYS[3]) or '0')
local token = tonumber(ARGV[2])
if token < fence then return redis.error_reply('FENCED another gateway has the lease') end
if token > fence then redis.call('SET', KEYS[3], ARGV[2]) end
local epoch, version = begin(KEYS[1], KEYS[2], ARGV[1])
local since, prefix, most, now_here = ARGV[3], ARGV[4], tonumber(ARGV[5]), server_now()

local function hear(key, index, text)
  local told = words_of(text)
  local found = redis.call('HMGET', key, 'id', 'base', 'keep')
  local id, base, keep_text = found[1], found[2], found[3]
  local life = life_of(epoch, id, index)
  if not life then
    create(key, index, epoch, version)
    life, base, keep_text = -1, false, false
  end
  local joined = told[6] ~= '0' and joined_base(base, tonumber(told[4]), tonumber(told[5]), told[6], told[7])
  if joined and joined ~= base then redis.call('HSET', key, 'base', joined) end
  local oldest, keep = dropping(key, keep_text, tonumber(told[2]), math.min(now_here, tonumber(told[3])))
  local fields, news = {}, {}
  for at = 8, #told, 2 do
    local here, elsewhere = sums_of(key, told[at])
    local count, slot = tonumber(told[at + 1]), tonumber(told[at])
    if count > (elsewhere or 0) and slot >= oldest then
      fields[#fields + 1] = 's' .. told[at]
      fields[#fields + 1] = number(here or 0) .. ' ' .. number(count)
      news[#news + 1] = version
      news[#news + 1] = told[at]
    end
  end
  if #news > 0 then write(key, index, fields, news, keep_text, keep, oldest) end
  live_on(key, index, life, tonumber(told[1]))
  return 1
end

local function read(name)
  local key, index = prefix .. 'b:' .. name, prefix .. 'i:' .. name
  local found = redis.call('HMGET', key, 'id', 'base')
  if not life_of(epoch, found[1], index) then
    -- It has expired.
    redis.call('ZREM', KEYS[2], name)
    return ''
  end
  local sums = {}
  for _, slot in ipairs(redis.call('ZREVRANGEBYSCORE', index, number(version), '(' .. since, 'LIMIT', 0, MAX_SLOTS)) do
    local here = sums_of(key, slot)
    if here and here > 0 then
      sums[#sums + 1] = slot
      sums[#sums + 1] = number(here)
    end
  end
  return (found[2] or '') .. ';' .. table.concat(sums, ' ')
end

local heard = {}
for i = 6, #ARGV do
  local is_done, failure = pcall(hear, KEYS[2 * i - 8], KEYS[2 * i - 7], ARGV[i])
  heard[#heard + 1] = is_done and '' or error_of(failure)
end
local found = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. since, number(version), 'WITHSCORES', 'LIMIT', 0, most)
local until_version, count = version, #found / 2
if count == most then
  -- Those that one call raised stay together: it raises fewer than these.
  until_version = tonumber(found[#found]) - 1
  while count > 0 and tonumber(found[2 * count]) > until_version do count = count - 1 end
  -- None of ours: nobody waits for the rest.
  if count == 0 then until_version, count = math.ceil(until_version + 1), most end
end
local answers = {epoch, number(until_version), version, heard}
for i = 1, count do
  local is_done, answer = pcall(read, found[2 * i - 1])
  if answer ~= '' then
    answers[#answers + 1] = found[2 * i - 1]
    answers[#answers + 1] = is_done and answer or error_of(answer)
  end
end
for _ = 1, 8 do
  -- What has expired is left out of the index now and then.
  local name = redis.call('ZRANDMEMBER', KEYS[2])
  local is_there = not name or name == '@' or redis.call('EXISTS', prefix .. 'b:' .. name) == 1
  if not is_there then redis.call('ZREM', KEYS[2], name) end
end
return answers
"""
)
"""KEYS: clock, changed, fence, and two of each bucket that is told. ARGV: an epoch if there is none, the token, the
version after which it asks, the head of all names, how many buckets it takes at most, `record.elsewhere` for each that
is told. Answers the epoch, the version up to which this is all, the version, for each that was told '' or `!` and the
error, and then names with `base;slot count slot count`."""

LEASE: Final = """
local holder, token = string.match(redis.call('GET', KEYS[1]) or '', '^(.*) (%d+)$')
if not holder then
  local time = redis.call('TIME')
  -- More than any before, also when the last one was lost with the server's data.
  token = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') + 1, time[1] * 1000 + math.floor(time[2] / 1000))
  token = string.format('%.0f', token)
  redis.call('SET', KEYS[2], token)
elseif holder ~= ARGV[1] then
  return '0'
end
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. token, 'PX', ARGV[2])
return token
"""
"""KEYS: lease, fence. ARGV: who asks for it, for how many milliseconds. Answers its token; 0 when another has it."""

GIVE_UP: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
"""KEYS: lease. ARGV: the holder, a space and the token."""


class ShardKeys:
    """The names of one shard."""

    def __init__(self, prefix: str, tag: str) -> None:
        self.head: Final = f"{prefix}:fabric{VERSION}:{{{tag}}}:".encode()
        self.clock: Final = self.head + b"clock"
        self.changed: Final = self.head + b"changed"
        self.lease: Final = self.head + b"lease"
        self.fence: Final = self.head + b"fence"
        self.of_accounts: Final = (self.head + b"strict", self.head + b"short")

    def of_bucket(self, key: bytes) -> tuple[bytes, bytes]:
        """The hash, and the index of its slots."""
        return self.head + b"b:" + key, self.head + b"i:" + key


class FabricKeys:
    """The names of one region.

    Args:
        tags: hash tags of the shards, spread over the nodes of a Cluster. All sidecars have the same.
    """

    def __init__(self, prefix: str, tags: tuple[str, ...] = ("0",)) -> None:
        self.shards: Final = tuple(ShardKeys(prefix, tag) for tag in tags)

    def shard_of(self, key: bytes) -> int:
        """The number of the shard with this bucket."""
        return crc32(key) % len(self.shards)
