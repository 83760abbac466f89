-- What the ledger says was used since the period began, if nobody has said it before.
-- KEYS: quota. ARGV: span, start of the period, used, watermark, a name for this seeding.

local begun = tonumber((redis.call('HGET', KEYS[1], 'start')))
if begun and begun >= tonumber(ARGV[2]) then return 0 end
local now = clock()
local _, ends = period(ARGV[1], tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], 'start', ARGV[2], 'used', ARGV[3], 'watermark', ARGV[4], 'epoch', ARGV[5])
redis.call('PEXPIRE', KEYS[1], max(ends - now, 0) + 2 * DAY)
return 1
