"""The accounts of a region's strict limits: the key that holds them, and the scripts that work on it. No I/O.

All accounts of a shard are in one hash, `{prefix}:fabric1:{TAG}:strict`, so that the server loses all of them or none:

    @            history lineage clock time
    members      who shares strict limits, as the gateway says (`account_calls.py`); `version` is its SHA-1
    named        epoch clock: of these members, and when they were named
    lCALLER      number clock: the last call done of that caller id (`account_calls.py`)
    bKEY         full generation out former home rate used class: the account of one bucket
    taken        how many accounts there are; `r{CLASS}` those of the rules of a class

**The account** of a bucket has the region's part of its limit, the *home*. It is filled at `full`, if nothing is drawn
until then: its level is `home - (full - clock) * rate`. `out` and `former` are what sidecars were granted, may still
spend, and said in this generation and the one before. Always `level + out + former <= home`: what no longer fits is
spilled. A generation lasts `COUNTED_US`, so a grant is counted for one to two of them. Without an account it is full,
as far as it can have been filled since `COUNTED_US` after the lineage began.

**Room** is as in `crdt.places`: there are no further accounts for a class of rules (`scripts.class_of`) that has
`RULE_SHARE` times as many as are free. From what has no account nothing is drawn.

Beside it, `{prefix}:fabric1:{TAG}:short` has the buckets of which less was drawn than was wanted, by the clock. The
gateway asks other regions for these. Nothing is wrong when it is lost.

**The clock** counts microseconds since the lineage began. It goes by the server's, but for steps back, and of more than
`MOST_STEP_US` between two calls: the server's clock was set then, or nobody called. That time is lost: nothing refills
in it, and no grant ends. The gateway calls at each of its ticks.

**The lineage** is another one when the server may have lost a call that it answered: when there is no `@`, when the
server has another replication id (it names a history of data; it changes when a server starts, and when a replica is
promoted), or when somebody knows of a later call than the server. Then the hash is deleted, all accounts are empty, and
begin to refill when nobody can hold anything of the former lineage.

**A call** is done once: the library may send it twice, and what was sent to a server that hung may be done late.
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.crdt.granted import COUNTED_US
from ratelimit_sidecar.crdt.places import RULE_SHARE
from ratelimit_sidecar.fabric.scripts import NUMBERS

MOST_STEP_US: Final = 100_000
"""Between two calls. Who sets a clock, rather than slewing it, does so by more (ntpd by 128 ms)."""

KEPT_US: Final = 60_000_000
"""A full account is dropped so long after it was `used`: by the last call for it, or if it had another limit or home
before, when that would have refilled it and this time was over."""

CALLER_FORGOTTEN_US: Final = 600_000_000
"""A caller id that did not call for so long is forgotten."""

SHORT_US: Final = 500_000
MAX_TOLD: Final = 64
"""A bucket is short for so long after a call that got less than it wanted; the gateway is told of so many."""

_BEGIN: Final = (
    NUMBERS
    + f"""
local MOST_STEP, COUNTED, KEPT, CALLER_FORGOTTEN = {MOST_STEP_US}, {COUNTED_US}, {KEPT_US}, {CALLER_FORGOTTEN_US}
local RULE_SHARE, SHORT, MAX_TOLD = {RULE_SHARE}, {SHORT_US}, {MAX_TOLD}
"""
    + """
local key = KEYS[1]

local function server_history()
  return string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)') or error('no replication id')
end

local history, time = server_history(), server_time()

local function begin_lineage(lineage)
  redis.call('UNLINK', key)
  redis.call('HSET', key, '@', history .. ' ' .. lineage .. ' 0 ' .. number(time))
  return lineage, 0
end

local function begin(drawn)
  -- history, lineage, clock, time
  local known, lineage, clock, last = string.match(redis.call('HGET', key, '@') or '', '^(%S+) (%S+) (%d+) (%d+)$')
  if known ~= history then return begin_lineage(drawn) end
  local step = time - tonumber(last)
  clock = tonumber(clock)
  if step > 0 and step <= MOST_STEP then clock = clock + step end
  redis.call('HSET', key, '@', history .. ' ' .. lineage .. ' ' .. number(clock) .. ' ' .. number(time))
  return lineage, clock
end

local function count(class, accounts)
  redis.call('HINCRBY', key, 'taken', accounts)
  redis.call('HINCRBY', key, 'r' .. class, accounts)
end

local function read_account(text)
  -- full: when its level is its home; out, former: granted in its generation and in the one before; used: see KEPT_US
  local full, generation, out, former, home, rate, used, class =
    string.match(text, '^(%d+%.%d+) (%d+) (%d+) (%d+) (%d+) (%d[%w.-]*) (%d+) (%d+)$')
  if not tonumber(rate) then return nil end
  return {
    full = tonumber(full), generation = tonumber(generation), out = tonumber(out), former = tonumber(former),
    home = tonumber(home), rate = tonumber(rate), used = tonumber(used), class = class
  }
end

local function forget_short(short, clock)
  redis.call('ZREMRANGEBYSCORE', short, '-inf', number(clock - SHORT))
end

local function level_of(account, clock)
  -- What did not fit beside the grants is spilled: until the end of each generation, and until now.
  local generation = math.floor(clock / COUNTED)
  while account.generation < generation and account.out + account.former > 0 do
    local ended = (account.generation + 1) * COUNTED
    account.full = math.max(account.full, ended + (account.out + account.former) / account.rate)
    account.former, account.out, account.generation = account.out, 0, account.generation + 1
  end
  account.generation = generation
  account.full = math.max(account.full, clock + (account.out + account.former) / account.rate)
  return account.home - (account.full - clock) * account.rate
end
"""
)

DRAW: Final = (
    _BEGIN
    + """
local lineage, clock = begin(ARGV[1])
local caller, call, answered = 'l' .. ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
-- number, clock
local done = tonumber(string.match(redis.call('HGET', key, caller) or '0', '^%d+'))
if lineage == ARGV[5] and done < answered then lineage, clock = begin_lineage(ARGV[1]) end
if lineage == ARGV[5] then
  if call <= done then return redis.error_reply('AGAIN this call was done before') end
  -- Also when it is refused below: it must not be done after the caller was told so.
  redis.call('HSET', key, caller, number(call) .. ' ' .. number(clock))
end
local version = redis.call('HGET', key, 'version') or ''
if lineage ~= ARGV[5] or version ~= ARGV[6] or version == '' then
  return {lineage, version, ARGV[3], redis.call('HGET', key, 'members') or ''}
end
local generation, max_buckets = math.floor(clock / COUNTED), tonumber(ARGV[7])

local function has_room(class)
  local taken = redis.call('HMGET', key, 'taken', 'r' .. class)
  return (tonumber(taken[2]) or 0) < RULE_SHARE * (max_buckets - (tonumber(taken[1]) or 0))
end

local function draw(name, text)
  -- The account's home and rate; of the former grant the generation that it was counted in, all of it, what goes on and
  -- what goes back; of the next one tokens, room and what is spared of the room; the class of the rule.
  local home, rate, was, ends, kept, back, wanted, room, spared, class =
    string.match(text, '^(%d+) (%S+) (%-?%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
  home, rate, was, ends = tonumber(home), tonumber(rate), tonumber(was), tonumber(ends)
  kept, back, wanted = tonumber(kept), tonumber(back), tonumber(wanted)
  local found = redis.call('HGET', key, 'b' .. name)
  if home == 0 or not (found or has_room(class)) then return '0 0 0 0' end
  if not found then count(class, 1) end
  local account, level, used = found and read_account(found), nil, clock
  if account then
    level = level_of(account, clock)
    used = math.max(used, account.used)
    if account.home ~= home or account.rate ~= rate then
      -- The limit may be changed back. Made anew, the account would be full by then.
      used = math.max(used, math.ceil(account.full) - KEPT)
    end
  elseif found then
    -- Damaged. Who knows what was granted: as at the beginning of a lineage.
    account = {full = 0, generation = generation, out = 0, former = 0}
    level = -COUNTED * rate
  else
    account = {full = 0, generation = generation, out = 0, former = 0}
    level = math.max(0, clock - COUNTED) * rate
  end
  -- The former grant ends.
  if was >= 0 then
    local count = was == generation and 'out' or was == generation - 1 and 'former'
    if count and account[count] >= ends and kept + back <= ends then
      account[count] = account[count] - ends
      level = level + back
    else
      kept = 0
    end
  end
  account.out = account.out + kept
  level = math.min(level, home - account.out - account.former)
  local drawn = math.max(0, math.min(wanted, math.floor(level)))
  level, account.out = level - drawn, account.out + drawn
  if drawn < wanted then
    redis.call('ZADD', KEYS[2], clock, name)
    forget_short(KEYS[2], clock)
  end
  -- In the first moments there are grants of the former lineage, for which there has to be room as well.
  local free = clock < COUNTED and 0 or home - math.max(0, level) - account.out - account.former
  room = math.max(0, math.min(tonumber(room), math.floor(free - math.min(free / 4, tonumber(spared)))))
  account.out = account.out + room
  local full = clock + (home - level) / rate
  if clock < COUNTED then full = math.max(full, COUNTED + home / rate) end
  -- Rounded up, to what is exact for years.
  full = string.format('%.6f', math.ceil(full * 64) / 64)
  redis.call('HSET', key, 'b' .. name, table.concat({
    full, number(generation), number(account.out), number(account.former), number(home),
    string.format('%.17g', rate), number(used), account.class or class
  }, ' '))
  return table.concat({number(kept), number(drawn), number(room), number(math.max(0, math.floor(level)))}, ' ')
end

local answers = {lineage, generation, ARGV[3]}
for i = 8, #ARGV, 2 do answers[#answers + 1] = draw(ARGV[i], ARGV[i + 1]) end
return answers
"""
)
"""KEYS: the hash, and `short`. ARGV: a lineage if there is none, the caller id, the number of this call and of its last
one that was answered, the lineage and the version that it knows, how many accounts there may be; for each bucket its
key and `home rate generation ends kept back wanted room spared class`. Answers the lineage, the version, the number of
the call and the members, when nothing was done since the caller knows others; else the lineage, the generation, the
number of the call, and for each `kept drawn room left`."""

BEAT: Final = (
    _BEGIN
    + """
local fence = tonumber(redis.call('GET', KEYS[3]) or '0')
local token = tonumber(ARGV[2])
if token < fence then return redis.error_reply('FENCED another gateway has the lease') end
if token > fence then redis.call('SET', KEYS[3], ARGV[2]) end
local lineage, clock = begin(ARGV[1])
local epoch, known = tonumber(ARGV[6]), redis.call('HGET', key, 'members')
-- epoch, clock
local named, since = string.match(redis.call('HGET', key, 'named') or '', '^(%d+) (%d+)$')
named, since = tonumber(named) or 0, tonumber(since) or clock
if not known or epoch > named or (epoch == named and known ~= ARGV[3]) then
  since = clock
  redis.call('HSET', key, 'members', ARGV[3], 'version', redis.sha1hex(ARGV[3]))
  redis.call('HSET', key, 'named', number(epoch) .. ' ' .. number(clock))
end
local found = redis.call('HSCAN', key, ARGV[4], 'COUNT', ARGV[5])
for i = 1, #found[2], 2 do
  local name, kind = found[2][i], string.sub(found[2][i], 1, 1)
  if kind == 'l' then
    -- number, clock
    local called = tonumber(string.match(found[2][i + 1], '%d+$')) or 0
    if clock - called > CALLER_FORGOTTEN then redis.call('HDEL', key, name) end
  elseif kind == 'b' then
    local account = read_account(found[2][i + 1])
    if account then
      local level = level_of(account, clock)
      if account.out + account.former == 0 and level >= account.home and clock - account.used > KEPT then
        redis.call('HDEL', key, name)
        count(account.class, -1)
      end
    end
  end
end
forget_short(KEYS[2], clock)
return {math.max(0, since + COUNTED - clock), found[1], redis.call('ZREVRANGE', KEYS[2], 0, MAX_TOLD - 1)}
"""
)
"""KEYS: the hash, `short` and the fence. ARGV: a lineage if there is none, the gateway's token, the members, where the
search for what can be dropped goes on, how many fields it looks at, and the epoch of the members; those of a later one
stay. Answers for how many microseconds there may be grants by former members, where the search goes on next, and the
buckets that are short."""
