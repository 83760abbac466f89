-- What an overdue reservation holds. KEYS: deadlines, reservation. ARGV: request id.
-- → {admitted, plan, costs, intent, progress}; nothing where it is gone, and its deadline is then too

local known = redis.call('GET', KEYS[2])
local record = known and cmsgpack.unpack(known)
if not record or record[1] ~= 'open' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  return false
end
return {clock() - record[2], record[8], record[9], record[10], record[11]}
