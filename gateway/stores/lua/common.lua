-- What the scripts share: rules, counters, the calendar. Everything is decided by one clock, Redis's own, in ms.
--
-- A rule is {kind, metric, limit, span, shadow, same, name}: kind 'w' a window of span ms, 'c' a lease of span ms,
-- 'q' a quota of a 'day' or 'month'; metric the place of its cost, 0 for always 1; same the place of an earlier rule
-- that has the same counter and counts for both, else 0. What a counter was seen to hold is a table; it is written back
-- only by the functions that say so.

local BUCKETS = 60      -- of a window; the one under way comes on top, and the oldest is counted whole
local LEASE_WAIT = 1000 -- nobody knows when a request ends
local OVERDUE = 45000   -- a reservation that nobody keeps up is looked after by whoever comes by
local OPEN = 86400000   -- and forgotten after this
local SETTLED = 300000  -- so long a repeated call finds that it is one
local LATE = 86400000   -- and so long an amount waits for its row
local CALL = 250       -- by so much a caller may be wrong of when a request was admitted: as long as its call takes
local NEVER = -1
local DAY = 86400000

local floor, ceil, max, min = math.floor, math.ceil, math.max, math.min

local function costs_of(packed, at)
  local tokens, nano_usd, requests = struct.unpack('<ddd', packed, at or 1)
  return {tokens, nano_usd, requests, [0] = 1}
end

local function month(at)
  local days = floor(at / DAY)
  local z = days + 719468 -- days since 0000-03-01, so that leap days end the year
  local era = floor(z / 146097)
  local day = z - era * 146097
  local year = floor((day - floor(day / 1460) + floor(day / 36524) - floor(day / 146096)) / 365)
  local of_year = day - (365 * year + floor(year / 4) - floor(year / 100))
  local of_month = of_year - floor((153 * floor((5 * of_year + 2) / 153) + 2) / 5)
  return (days - of_month) * DAY
end

local function period(span, at)
  if span == 'day' then
    local start = at - at % DAY
    return start, start + DAY
  end
  local start = month(at)
  return start, month(start + 31 * DAY)
end

-- Windows: a hash of bucket → used, with the sum of them in `used`, and in `last` the bucket of the last writing, after
-- which the buckets that have left the window since are still in the sum. `born` is when it was made of nothing. What
-- Redis had lost and callers tell of is in `lost`, what that is known up to in `told`; what came back by itself in
-- `again`, the newest of it in `newest`.

local window = {}

-- Writes. A caller saw `used` in it at `since`, and until `ends` none of that would have left: so long it counts. Of
-- several that saw different things, the one that saw most is right.
function window.restore(key, rule, size, last, used, since, ends, now)
  if not last then
    last = floor(ends / size) - BUCKETS - 1
    redis.call('HSET', key, 'last', last, 'used', 0, 'born', now)
    redis.call('PEXPIRE', key, rule[4] + 3 * size)
  end
  local got = redis.call('HMGET', key, 'lost', 'told', 'again', 'newest')
  local more = used - (tonumber(got[1]) or 0)
  if got[3] and tonumber(got[4]) <= since + CALL then more = more - tonumber(got[3]) end
  if more <= 0 then return end
  redis.call('HINCRBY', key, 'lost', more)
  redis.call('HSET', key, 'told', max(since, tonumber(got[2]) or 0))
  redis.call('HINCRBY', key, 'used', more)
  redis.call('HINCRBY', key, max(floor(ends / size) - BUCKETS - 1, last - BUCKETS), more)
end

-- `saw`, `since` and `ends`: what the caller was last told was used, when, and when all of it will have left. Until then
-- the hash outlives that moment; one that is younger, or none, proves a loss.
function window.look(key, rule, now, saw, since, ends)
  local size = ceil(rule[4] / BUCKETS)
  local current = floor(now / size)
  local got = redis.call('HMGET', key, 'last', 'used', current, 'born')
  local born = tonumber(got[4]) or 0
  if born > now then -- the clock has stepped back: what is seen from now on is not of before the birth
    redis.call('HSET', key, 'born', now)
    born = now
  end
  if saw and now < ends and (not got[1] or born > since) then
    window.restore(key, rule, size, tonumber(got[1]), saw, since, ends, now)
    got = redis.call('HMGET', key, 'last', 'used', current)
  end
  local w = {key = key, size = size, current = current, last = tonumber(got[1]), used = 0, here = 0, gone = {}, now = now}
  w.lasts = rule[4] + 3 * size
  if not w.last then return w end
  if current > w.last + BUCKETS then
    w.anew = true
    return w
  end
  w.used = tonumber(got[2])
  if current < w.last - BUCKETS then -- the clock has stepped back so far that all of it is made to count as of now
    w.last, w.here = current, w.used
    redis.call('DEL', key)
    redis.call('HSET', key, 'last', current, 'used', w.used, current, w.used)
    redis.call('PEXPIRE', key, w.lasts)
  elseif current < w.last then -- or so little that the window just waits for it
    w.current, w.here = w.last, tonumber(redis.call('HGET', key, w.last)) or 0
  elseif current == w.last then
    w.here = tonumber(got[3]) or 0
  else
    for bucket = w.last - BUCKETS, current - BUCKETS - 1 do w.gone[#w.gone + 1] = bucket end
    for _, left in ipairs(redis.call('HMGET', key, unpack(w.gone))) do w.used = w.used - (tonumber(left) or 0) end
  end
  return w
end

function window.wait(w, cost, limit, now)
  local excess = w.used + cost - limit
  if excess <= 0 then return 0 end
  if cost > limit then return NEVER end
  local buckets = {}
  for bucket = w.current - BUCKETS, w.current do buckets[#buckets + 1] = bucket end
  for i, used in ipairs(redis.call('HMGET', w.key, unpack(buckets))) do
    excess = excess - (tonumber(used) or 0)
    if excess <= 0 then return (buckets[i] + BUCKETS + 1) * w.size - now end
  end
  return (w.current + BUCKETS + 1) * w.size - now
end

function window.reset(w, _, now)
  if w.used == 0 then return 0 end
  return (w.last + BUCKETS + 1) * w.size - now
end

-- Writes. `bucket` is not in the future.
function window.add(w, bucket, amount)
  if amount == 0 then return end
  if w.anew then
    redis.call('DEL', w.key)
  elseif #w.gone > 0 then
    redis.call('HDEL', w.key, unpack(w.gone))
  end
  w.used = w.used + amount
  if bucket == w.current then w.here = w.here + amount end
  redis.call('HSET', w.key, 'last', w.current, 'used', w.used, w.current, w.here)
  if bucket ~= w.current then redis.call('HINCRBY', w.key, bucket, amount) end
  if not w.last then redis.call('HSET', w.key, 'born', w.now) end
  if w.anew or w.last ~= w.current then redis.call('PEXPIRE', w.key, w.lasts) end
  w.anew, w.last, w.gone = false, w.current, {}
end

-- Writes. Counts as of when it was admitted; the bucket, or nothing where that has left the window.
function window.take(w, _, cost, now, admitted)
  local bucket = w.current
  if admitted < now then
    bucket = min(bucket, floor(admitted / w.size))
    if bucket < w.current - BUCKETS then return false, 0 end
    window.retake(w, bucket, cost, admitted)
  else
    window.add(w, bucket, cost)
  end
  return bucket, cost
end

-- Writes. What was admitted before, unless it is in what was told.
function window.retake(w, bucket, cost, admitted)
  local told, newest = unpack(redis.call('HMGET', w.key, 'told', 'newest'))
  if cost == 0 or told and admitted <= told + CALL and not w.anew then return end
  window.add(w, bucket, cost)
  redis.call('HINCRBY', w.key, 'again', cost)
  redis.call('HSET', w.key, 'newest', max(admitted, tonumber(newest) or 0))
end

-- Writes. More than was reserved is spent now, less was not spent then. Always the whole truth.
function window.settle(key, rule, bucket, reserved, actual, now)
  if not bucket then reserved = 0 end
  if actual > reserved then
    local w = window.look(key, rule, now)
    window.add(w, w.current, actual - reserved)
  elseif actual < reserved then
    local back = min(reserved - actual, tonumber(redis.call('HGET', key, bucket)) or 0)
    if back > 0 then
      redis.call('HINCRBY', key, bucket, -back)
      redis.call('HINCRBY', key, 'used', -back)
    end
  end
  return true
end

-- Leases: a sorted set of request id by when its lease ends.

local lease = {}

function lease.look(key, rule, now)
  return {key = key, lasts = rule[4], used = redis.call('ZCOUNT', key, string.format('(%d', now), '+inf')}
end

function lease.wait(l, _, limit)
  if limit == 0 then return NEVER end
  if l.used < limit then return 0 end
  return LEASE_WAIT
end

function lease.reset(l)
  if l.used == 0 then return 0 end
  return l.lasts
end

-- Writes.
function lease.renew(key, rule, id, now)
  redis.call('ZADD', key, now + rule[4], id)
  redis.call('PEXPIRE', key, rule[4] + 60000)
end

-- Writes.
function lease.take(l, rule, _, now, _, id)
  redis.call('ZREMRANGEBYSCORE', l.key, '-inf', now)
  lease.renew(l.key, rule, id, now)
  l.used = redis.call('ZCARD', l.key)
  return false, 0
end

-- Quotas: a hash of when the period began, used, the watermark of the sum it was seeded with, and of which seeding it is.

local quota = {}

function quota.look(key, rule, now)
  local got = redis.call('HMGET', key, 'start', 'used', 'watermark', 'epoch')
  local start, ends = period(rule[4], now)
  local q = {key = key, begun = tonumber(got[1]), used = tonumber(got[2]) or 0, epoch = got[4], ends = ends}
  q.watermark = tonumber(got[3])
  q.unknown = not (q.begun and q.begun >= start) and start -- later: the clock has stepped back
  return q
end

function quota.wait(q, cost, limit, now)
  if q.used + cost <= limit then return 0 end
  if cost > limit then return NEVER end
  return q.ends - now
end

function quota.reset(q, _, now)
  return q.ends - now
end

-- Writes. The epoch, or nothing where the quota does not know the period.
function quota.take(q, _, cost, _, admitted)
  if q.unknown or q.begun > admitted then return false, 0 end
  if cost > 0 then q.used = redis.call('HINCRBY', q.key, 'used', cost) end
  return q.epoch, cost
end

-- Writes. False where what was reserved is not in the quota (any more).
function quota.settle(key, _, epoch, reserved, actual)
  if not epoch or redis.call('HGET', key, 'epoch') ~= epoch then return false end
  if actual ~= reserved then redis.call('HINCRBY', key, 'used', actual - reserved) end
  return true
end

local counters = {w = window, c = lease, q = quota}

-- What the rules' counters hold. `views` is what the caller has seen of each window, one after the other.
local function look(rules, now, views)
  local seen, at = {}, 1
  for i, rule in ipairs(rules) do
    if rule[6] > 0 then
      seen[i] = seen[rule[6]]
    elseif views and rule[1] == 'w' then
      local saw, since, ends
      saw, since, ends, at = struct.unpack('<ddd', views, at)
      seen[i] = window.look(KEYS[i + 1], rule, now, saw, since, ends)
    else
      seen[i] = counters[rule[1]].look(KEYS[i + 1], rule, now)
    end
  end
  return seen
end

local function figures(rules, seen, now)
  local remaining, reset = {}, {}
  for i, rule in ipairs(rules) do
    remaining[i] = max(0, rule[3] - seen[i].used)
    reset[i] = counters[rule[1]].reset(seen[i], rule, now)
  end
  return remaining, reset
end

-- Writes the reservation: {state, admitted, remaining, reset, shadowed, …}, so that a repeated call finds its answer. An
-- open one goes on with places, reserved, plan, packed costs, intent, progress; a settled one with stream entry, late.
local function hold(rules, seen, shadowed, now, admitted, id, costs, progress)
  local places, reserved = {}, {}
  for i, rule in ipairs(rules) do
    if rule[6] == 0 then
      places[i], reserved[i] = counters[rule[1]].take(seen[i], rule, costs[rule[2]], now, admitted, id)
    else
      places[i], reserved[i] = false, 0
    end
  end
  local remaining, reset = figures(rules, seen, now)
  local record = {'open', admitted, remaining, reset, shadowed, places, reserved, ARGV[1], ARGV[2], ARGV[3], progress}
  redis.call('SET', KEYS[#KEYS], cmsgpack.pack(record), 'PX', OPEN)
  redis.call('ZADD', KEYS[1], now + OVERDUE, id)
  return {0, admitted, remaining, reset, shadowed}
end
