-- The request is under way: hold its leases and its reservation, and make anew what was lost.
-- KEYS as admit. ARGV as admit, then ms since admission, progress in tokens. → 1; 0 where it is settled

local now = clock()
local rules, costs, id = cmsgpack.unpack(ARGV[1]), costs_of(ARGV[2]), ARGV[4]
local known = redis.call('GET', KEYS[#KEYS])
if not known then
  hold(rules, look(rules, now), {}, now, now - tonumber(ARGV[5]), id, costs, tonumber(ARGV[6]))
  return 1
end
local record = cmsgpack.unpack(known)
if record[1] ~= 'open' then return 0 end
record[11] = tonumber(ARGV[6])
redis.call('SET', KEYS[#KEYS], cmsgpack.pack(record), 'PX', OPEN)
redis.call('ZADD', KEYS[1], now + OVERDUE, id)
for i, rule in ipairs(rules) do
  if rule[1] == 'c' then lease.renew(KEYS[i + 1], rule, id, now) end
end
return 1
