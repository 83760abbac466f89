-- This process is here. KEYS: members. ARGV: its name, for how many ms that holds. → how many are; its place among them

local now = clock()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local names, before = redis.call('ZRANGE', KEYS[1], 0, -1), 0
for _, name in ipairs(names) do
  if name < ARGV[1] then before = before + 1 end
end
return {#names, before}
