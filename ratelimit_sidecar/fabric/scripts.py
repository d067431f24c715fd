"""The keys of a fabric and the scripts that work on them. No I/O.

The keys are divided into shards: one, or in a Cluster several, each with a hash tag of its own. All names of a shard
begin with `{prefix}:fabric1:{TAG}:`, where 1 is the format's version:

    clock        epoch     drawn when there was none; another one means that the server lost its data
                 version   one more at each call
                 places    of all buckets here; `r{CLASS}` those of the rules of a class
    changed      the buckets that a sidecar here raised, with the version of the latest time
    held         all buckets here, as `CLASS:KEY`: the second at which each is full again, and as a fraction its places
    lease        who the gateway is; in the first shard
    fence        the highest token of a gateway that called
    strict       the accounts of strict limits: `accounts.py`; so is `short`
    b:KEY        id                     EPOCH:VERSION of its creation; what is of another epoch counts as absent
                 keep                   span until mark: see below
                 bases                  for each limit: boundary full period tokens, as in `persistence.redis_record`
                 o{life}                what that life of a sidecar took: slot ids and counts, as MessagePack
                 s{slot}                "here elsewhere": the sum of these counts, and what other regions took
    i:KEY        the bucket's slots, with the version at which their sum changed last

Counts only grow, and a script raises a sum by as much as it raises a count, so all of it may be told again. What was
given back in a window is no sum: each tells how much it is in all, and the highest one counts.

A base has all that began before its boundary, since only those tell it who know all slots. Whoever reads later slots
that are older than the horizon folds them into it. So a debt stays known when nobody uses the bucket. While rules are
rolled out a bucket has several limits, each with a horizon and a refill of its own, and so with a base of its own.

A slot is dropped once it is older than the longest span for which anybody who writes to the bucket counts it; so it
does not matter if some of them still have another limit. `keep` has that span, until when it holds, and the number of
slots at which old ones are looked for.

**Room.** Anybody can invent keys, so buckets and their slots have places, of which there are so many. As in
`crdt.places`, the buckets of one class of rules have no more than a multiple of those that are free. Once half of all
are taken, buckets that are full again make room for others, instead of being kept for late news.

A bucket that cannot be read costs that bucket only: its answer is `!` and the error.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

VERSION: Final = 1

MAX_SLOTS: Final = 1_024
"""The most slots of one bucket. Of more, as when limits of a second and of a month run side by side, the oldest are
dropped."""

MAX_BASES: Final = 4
"""The most bases of one bucket; for a further limit the oldest one goes."""

PLACE_BYTES: Final = 128
"""About the bytes of a bucket with one slot, and of each further slot."""

PLACES_A_BUCKET: Final = 8
"""There are so many places for each of `max_buckets`: a region needs 1 KiB of Redis for each of them."""

ROOM_CLASSES: Final = 1_024
"""Rules are divided into so many, by their hash. Those of one class share their room."""

ROOM_SHARE: Final = 4
URGENT_ROOM_SHARE: Final = 8
"""A class of rules gets no further place once it has as many times those that are free: alone it gets 4/5 of all. For
buckets that are nearly used up there is more, 8/9. A bucket of which no caller chose the key always gets room."""

FULL_FOR_S: Final = 20
"""A bucket makes room for others when it has been full for so long. What is told later than that is not told in time
anyway (`MIN_HORIZON_US`, and as much for clocks)."""

NUMBERS: Final = """
local function number(value)
  return string.format('%.0f', value)
end

local function server_time()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end
"""
"""Functions that scripts share: a whole number as text, and the server's time in microseconds."""

_COMMON: Final = (
    NUMBERS
    + f"""
local MAX_SLOTS, MAX_BASES = {MAX_SLOTS}, {MAX_BASES}
local MAX_PACKED = 65536
local PLACE, COUNT_BYTES, MAX_PLACES, FULL_FOR = {PLACE_BYTES}, 15, 4095, {FULL_FOR_S}
"""
    + """
local clock, changed, held, head, most = KEYS[1], KEYS[2], KEYS[3], ARGV[3], tonumber(ARGV[4])

local now_here = server_time()
local epoch, version, taken

local function begin()
  epoch = redis.call('HGET', clock, 'epoch')
  if not epoch or not redis.call('ZSCORE', changed, '@') or not redis.call('ZSCORE', held, '@') then
    epoch = ARGV[1]
    redis.call('DEL', clock, changed, held)
    redis.call('HSET', clock, 'epoch', epoch)
    redis.call('ZADD', changed, 0, '@')
    redis.call('ZADD', held, 'inf', '@')
  end
  version = redis.call('HINCRBY', clock, 'version', 1)
  taken = tonumber(redis.call('HGET', clock, 'places') or '0')
end

local function take(class, places)
  taken = redis.call('HINCRBY', clock, 'places', number(places))
  redis.call('HINCRBY', clock, 'r' .. class, number(places))
end

local function has_room(class, share)
  -- Of less than half nobody has as much.
  if share == 0 or taken < most / 2 then return true end
  return tonumber(redis.call('HGET', clock, 'r' .. class) or '0') < share * (most - taken)
end

local function drop(member, score)
  local at = string.find(member, ':', 1, true)
  local name = string.sub(member, at + 1)
  redis.call('DEL', head .. 'b:' .. name, head .. 'i:' .. name)
  redis.call('ZREM', changed, name)
  redis.call('ZREM', held, member)
  take(string.sub(member, 1, at - 1), -(tonumber(score) % 1) * (MAX_PLACES + 1))
end

local function make_room(count)
  if taken < most / 2 then return end
  local found = redis.call('ZRANGEBYSCORE', held, '-inf', number(now_here / 1000000), 'WITHSCORES', 'LIMIT', 0, count)
  for i = 1, #found, 2 do drop(found[i], found[i + 1]) end
end

local function known_full(name, class)
  -- In how many seconds the bucket is full by what was told so far.
  local due = math.floor(tonumber(redis.call('ZSCORE', held, class .. ':' .. name) or '0'))
  return math.max(0, due - FULL_FOR - math.floor(now_here / 1000000))
end

local function hold(key, index, name, class, full, is_larger)
  -- Until when the bucket stays at least, and the places it takes.
  local member = class .. ':' .. name
  local known = tonumber(redis.call('ZSCORE', held, member) or '0')
  local had = (known % 1) * (MAX_PLACES + 1)
  local places = had
  if is_larger or had == 0 then
    local fields, slots = redis.call('HLEN', key), redis.call('ZCARD', index)
    -- As if each sidecar that has counts in it had some in each slot.
    local bytes = (fields + 1) * PLACE + 5 * #name + (fields - slots) * slots * COUNT_BYTES
    places = math.min(math.ceil(bytes / PLACE), MAX_PLACES)
  end
  if places ~= had then take(class, places - had) end
  local due, was_due = math.floor(now_here / 1000000) + full + FULL_FOR, math.floor(known)
  if places ~= had or due > was_due or due < was_due - FULL_FOR then
    redis.call('ZADD', held, string.format('%.17g', due + places / (MAX_PLACES + 1)), member)
  end
end

local function words_of(text)
  local words = {}
  for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
  return words
end

local function is_refund(slot)
  return math.floor(slot / 64) % 2 == 1
end

local function sums_in(text)
  if not text then return end
  -- What sidecars here took together, and other regions.
  local here, elsewhere = string.match(text, '^(%d+) (%d+)$')
  return tonumber(here), tonumber(elsewhere)
end

local function sums_of(key, slot)
  return sums_in(redis.call('HGET', key, 's' .. slot))
end

local function life_of(id, index)
  -- How long it lives on, in milliseconds; nil when it is absent. Both keys have to be there.
  if not id or string.sub(id, 1, #epoch + 1) ~= epoch .. ':' then return end
  local life = redis.call('PTTL', index)
  return life ~= -2 and life or nil
end

local function create(key, index)
  redis.call('DEL', key, index)
  local id = epoch .. ':' .. number(version)
  redis.call('HSET', key, 'id', id)
  redis.call('ZADD', index, 0, '@')
  return id
end

local function dropping(key, keep, span, now)
  -- Returns since when slots are kept, and `keep` as it is to be.
  -- For how long slots are kept, until when that holds, and the number of slots at which old ones are looked for.
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

local function joined_bases(text, boundary, full, period, rate)
  -- nil when there is none.
  local bases, own = {}, nil
  local words = words_of(text or '')
  for at = 1, #words, 4 do
    if words[at + 2] == period and words[at + 3] == rate then
      own, boundary, full = #bases + 1, math.max(boundary, tonumber(words[at])), math.max(full, tonumber(words[at + 1]))
    end
    bases[#bases + 1] = table.concat(words, ' ', at, at + 3)
  end
  if full > boundary then
    bases[own or #bases + 1] = number(boundary) .. ' ' .. number(full) .. ' ' .. period .. ' ' .. rate
  end
  if #bases > MAX_BASES then table.remove(bases, 1) end
  if #bases > 0 then return table.concat(bases, ' ') end
end

local function error_of(failure)
  return '!' .. string.sub(type(failure) == 'table' and failure.err or tostring(failure), 1, 200)
end
"""
)

SHARE: Final = (
    _COMMON
    + """
begin()
local field = 'o' .. ARGV[2]
local FIRST = 13

local function share(key, index, name, told)
  -- class, room, version seen, the time up to which slots are sealed there, milliseconds to be kept, seconds until full
  -- (-1: as before), span and time in microseconds, the boundary, full, period and tokens of a base from when all that
  -- was seen was in it (all 0 of a window), and from FIRST on slots and counts.
  local asked = words_of(told)
  local class, room, seen, ttl, full = asked[1], tonumber(asked[2]), asked[3], tonumber(asked[5]), tonumber(asked[6])
  local is_window = asked[11] == '0'
  local wanted = {'id', 'bases', 'keep', field}
  for at = FIRST, #asked, 2 do wanted[#wanted + 1] = 's' .. asked[at] end
  local found = redis.call('HMGET', key, unpack(wanted))
  local life = life_of(found[1], index)
  -- Slots that others took before the base of a sidecar that has not heard of them are not in it.
  local is_first = life and seen == '0'
  if not life then found, seen = {}, '0' end
  local id, base, keep_text, packed = found[1], found[2], found[3], found[4]
  local own = {}
  if packed then
    if #packed > MAX_PACKED then error('a field that is too long') end
    own = cmsgpack.unpack(packed)
  end
  local boundary, full_at = tonumber(asked[9]), tonumber(asked[10])
  local joined = not (is_window or is_first) and joined_bases(base, boundary, full_at, asked[11], asked[12])
  local may_grow = has_room(class, room)
  local is_quiet = full < 0
  if not id and (joined or #asked >= FIRST) and not is_quiet then
    if not may_grow then return '-;;' end
    id, life = create(key, index), -1
  end
  if not id then return ';;' end
  if joined and joined ~= base then
    redis.call('HSET', key, 'bases', joined)
    base = joined
  end
  local sums, fields, news, is_larger, mark = {}, {}, {}, false, ''
  local oldest, keep
  if #asked >= FIRST then
    oldest, keep = dropping(key, keep_text, tonumber(asked[7]), math.min(now_here, tonumber(asked[8])))
    for at = FIRST, #asked, 2 do
      local slot, count = tonumber(asked[at]), tonumber(asked[at + 1])
      local here, elsewhere = sums_in(found[(at - FIRST) / 2 + 5])
      local before = here and own[slot] or 0
      local is_news = count > before and slot >= oldest
      if is_news and not (here or may_grow) then
        mark = '-'
      elseif is_news then
        is_larger = is_larger or not here
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
  end
  -- Before old slots are dropped: nobody else may have them.
  local others = {}
  for _, slot in ipairs(redis.call('ZREVRANGEBYSCORE', index, number(version), '(' .. seen, 'LIMIT', 0, MAX_SLOTS)) do
    local here, elsewhere
    if sums[slot] then here, elsewhere = sums[slot][1], sums[slot][2] else here, elsewhere = sums_of(key, slot) end
    if here then
      local is_sealed = tonumber(slot) < tonumber(asked[4])
      local sum = here - (not is_sealed and own[tonumber(slot)] or 0) + elsewhere
      if is_window and is_refund(tonumber(slot)) then sum = math.max(here, elsewhere) end
      if sum > 0 then
        others[#others + 1] = slot
        others[#others + 1] = number(sum)
      end
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
    is_larger = is_larger or not packed
    redis.call('ZADD', changed, version, name)
    write(key, index, fields, news, keep_text, keep, oldest)
  end
  live_on(key, index, life, ttl)
  if not is_quiet then
    -- The sidecar does not know of these yet: full after both.
    if #others > 0 then full = full + known_full(name, class) end
    hold(key, index, name, class, math.min(full, math.ceil(ttl / 1000)), is_larger)
  end
  return mark .. id .. ';' .. (base or '') .. ';' .. table.concat(others, ' ')
end

local answers = {epoch, version}
make_room(2 * #ARGV)
for i = 5, #ARGV do
  local key, index = KEYS[2 * i - 6], KEYS[2 * i - 5]
  local is_done, answer = pcall(share, key, index, string.sub(key, #head + 3), ARGV[i])
  answers[#answers + 1] = is_done and answer or error_of(answer)
end
return answers
"""
)
"""KEYS: clock, changed, held, and two of each bucket. ARGV: an epoch if there is none, the name of this life, the head
of all names, how many places there are, `record.share_text` for each. Answers the epoch, the version, and for each
`id;base;slot count slot count`, after `-` when there was no room for some of it. The counts are what others took, but
of slots before the asker's boundary all that was taken."""

GATEWAY: Final = (
    _COMMON
    + """
local fence = tonumber(redis.call('GET', KEYS[4]) or '0')
local token = tonumber(ARGV[2])
if token < fence then return redis.error_reply('FENCED another gateway has the lease') end
if token > fence then redis.call('SET', KEYS[4], ARGV[2]) end
begin()
local since, most_answered = ARGV[5], tonumber(ARGV[6])
local FIRST = 11

local function receive(key, index, name, text)
  -- As in SHARE, but for the version seen.
  local told = words_of(text)
  local class, room, ttl = told[1], tonumber(told[2]), tonumber(told[3])
  local found = redis.call('HMGET', key, 'id', 'bases', 'keep')
  local id, base, keep_text = found[1], found[2], found[3]
  local life, may_grow, answer = life_of(id, index), has_room(class, room), ''
  if not life then
    if not may_grow then return '-' end
    create(key, index)
    life, base, keep_text = -1, false, false
  end
  local joined = told[9] ~= '0' and joined_bases(base, tonumber(told[7]), tonumber(told[8]), told[9], told[10])
  if joined and joined ~= base then redis.call('HSET', key, 'bases', joined) end
  local oldest, keep = dropping(key, keep_text, tonumber(told[5]), math.min(now_here, tonumber(told[6])))
  local fields, news = {}, {}
  for at = FIRST, #told, 2 do
    local here, elsewhere = sums_of(key, told[at])
    local count, slot = tonumber(told[at + 1]), tonumber(told[at])
    local is_news = count > (elsewhere or 0) and slot >= oldest
    if is_news and not (here or may_grow) then
      answer = '-'
    elseif is_news then
      fields[#fields + 1] = 's' .. told[at]
      fields[#fields + 1] = number(here or 0) .. ' ' .. number(count)
      news[#news + 1] = version
      news[#news + 1] = told[at]
    end
  end
  if #news > 0 then write(key, index, fields, news, keep_text, keep, oldest) end
  live_on(key, index, life, ttl)
  -- A gateway that is new may not have read yet what was taken here.
  local full = math.max(tonumber(told[4]), known_full(name, class))
  hold(key, index, name, class, math.min(full, math.ceil(ttl / 1000)), #news > 0)
  return answer
end

local function read(name)
  local key, index = head .. 'b:' .. name, head .. 'i:' .. name
  local found = redis.call('HMGET', key, 'id', 'bases')
  if not life_of(found[1], index) then
    -- It has expired.
    redis.call('ZREM', changed, name)
    return ''
  end
  local sums, others = {}, {}
  for _, slot in ipairs(redis.call('ZREVRANGEBYSCORE', index, number(version), '(' .. since, 'LIMIT', 0, MAX_SLOTS)) do
    local here, elsewhere = sums_of(key, slot)
    if here and here > 0 then
      sums[#sums + 1] = slot
      sums[#sums + 1] = number(here)
    end
    if elsewhere and elsewhere > 0 then
      others[#others + 1] = slot
      others[#others + 1] = number(elsewhere)
    end
  end
  return (found[2] or '') .. ';' .. table.concat(sums, ' ') .. ';' .. table.concat(others, ' ')
end

local replies = {}
make_room(2 * #ARGV)
for i = 7, #ARGV do
  local key = KEYS[2 * i - 9]
  local is_done, answer = pcall(receive, key, KEYS[2 * i - 8], string.sub(key, #head + 3), ARGV[i])
  replies[#replies + 1] = is_done and answer or error_of(answer)
end
local found =
  redis.call('ZRANGEBYSCORE', changed, '(' .. since, number(version), 'WITHSCORES', 'LIMIT', 0, most_answered)
local until_version, count = version, #found / 2
if count == most_answered then
  -- Those that one call raised stay together: it raises fewer than these.
  until_version = tonumber(found[#found]) - 1
  while count > 0 and tonumber(found[2 * count]) > until_version do count = count - 1 end
  -- No sidecar's call raises so many: whoever wrote these, nobody waits for the rest.
  if count == 0 then until_version, count = math.ceil(until_version + 1), most_answered end
end
local answers = {epoch, number(until_version), version, replies}
for i = 1, count do
  local is_done, answer = pcall(read, found[2 * i - 1])
  if answer ~= '' then
    answers[#answers + 1] = found[2 * i - 1]
    answers[#answers + 1] = is_done and answer or error_of(answer)
  end
end
for _ = 1, 8 do
  -- What has expired gives its places back now and then.
  local member = redis.call('ZRANDMEMBER', held)
  local at = string.find(member, ':', 1, true)
  if at and redis.call('EXISTS', head .. 'b:' .. string.sub(member, at + 1)) == 0 then
    drop(member, redis.call('ZSCORE', held, member))
  end
end
return answers
"""
)
"""KEYS: clock, changed, held, fence, and two of each bucket that is told. ARGV: an epoch if there is none, the token,
the head of all names, how many places there are, the version after which it asks, how many buckets it takes at most,
`record.gateway_text` for each that is told. Answers the epoch, the version up to which this is all, the version, for
each that was told '', `-` when there was no room for some of it, or `!` and the error, and then names with
`base;slot count slot count;slot count`: what was taken here, and elsewhere."""

LEASE: Final = """
-- The gateway's id and its token.
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


def class_of(rule: bytes) -> int:
    """The class of rules that share room.

    Args:
        rule: from `BucketPlaces.rule_key`.
    """
    return crc32(rule) % ROOM_CLASSES


class ShardKeys:
    """The names of one shard."""

    def __init__(self, prefix: str, tag: str) -> None:
        self.head: Final = f"{prefix}:fabric{VERSION}:{{{tag}}}:".encode()
        self.clock: Final = self.head + b"clock"
        self.changed: Final = self.head + b"changed"
        self.held: Final = self.head + b"held"
        self.lease: Final = self.head + b"lease"
        self.fence: Final = self.head + b"fence"
        self.of_accounts: Final = (self.head + b"strict", self.head + b"short")

    def of_bucket(self, key: bytes) -> tuple[bytes, bytes]:
        """The names of a bucket's hash, and of the index of its slots."""
        return self.head + b"b:" + key, self.head + b"i:" + key


class FabricKeys:
    """The names of one region.

    Args:
        tags: hash tags of the shards, spread over the nodes of a Cluster. All sidecars have the same.
    """

    def __init__(self, prefix: str, tags: tuple[str, ...] = ("0",)) -> None:
        self.shards: Final = tuple(ShardKeys(prefix, tag) for tag in tags)

    def places(self, max_buckets: int) -> int:
        """How many places each shard has, when a sidecar may have so many buckets."""
        return -(-max_buckets * PLACES_A_BUCKET // len(self.shards))

    def shard_of(self, key: bytes) -> int:
        """The number of the shard with this bucket."""
        return crc32(key) % len(self.shards)
