-- Keep an entry for a while, and no more in its partition than there may be: those that would end first go for it.
-- KEYS: the entry, when entries end, how large they are. ARGV: name, entry, milliseconds, most bytes, overhead of one.
local name, entry, most = ARGV[1], ARGV[2], tonumber(ARGV[4])
local size = #entry + ARGV[5]
local before = string.sub(KEYS[1], 1, -(#name + 1))

local function unlist(listed)
  local had = redis.call('HGET', KEYS[3], listed)
  if had then
    redis.call('HDEL', KEYS[3], listed)
    redis.call('HINCRBY', KEYS[3], 'total', -had)
  end
  redis.call('ZREM', KEYS[2], listed)
end

local function drop(listed)
  unlist(listed)
  redis.call('DEL', before .. listed)
end

if size > most then
  drop(name)
  return 0
end
redis.call('SET', KEYS[1], entry, 'PX', ARGV[3]) -- before all else: a server that is full refuses a script's first write only
unlist(name)
local now = clock()
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)) do drop(ended) end
local total = tonumber(redis.call('HGET', KEYS[3], 'total') or 0)
while total + size > most do
  local first = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not first then -- Redis has evicted what was known of them
    redis.call('DEL', KEYS[3])
    break
  end
  drop(first)
  total = tonumber(redis.call('HGET', KEYS[3], 'total') or 0)
end
redis.call('ZADD', KEYS[2], now + ARGV[3], name)
redis.call('HSET', KEYS[3], name, size)
redis.call('HINCRBY', KEYS[3], 'total', size)
return 1
