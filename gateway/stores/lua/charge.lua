-- The row of a request that lost its reservation is in the ledger: count it, unless a seeding has.
-- KEYS: deadlines, one for each rule, reservation. ARGV: seq of the row. → whether there was something to count

local known = redis.call('GET', KEYS[#KEYS])
local record = known and cmsgpack.unpack(known)
if not record or record[1] ~= 'late' then return 0 end
local late, seq = record[7], tonumber(ARGV[1])
for at = 1, #late, 3 do
  local key = KEYS[late[at] + 1]
  local got = redis.call('HMGET', key, 'start', 'watermark')
  if tonumber(got[1]) == late[at + 1] and tonumber(got[2]) < seq then
    redis.call('HINCRBY', key, 'used', late[at + 2])
  end
end
record[1], record[7] = 'done', {}
redis.call('SET', KEYS[#KEYS], cmsgpack.pack(record), 'PX', LATE)
return 1
