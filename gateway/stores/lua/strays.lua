-- Events that are old enough for their own replica to have recorded them. KEYS: stream. ARGV: age in ms, how many at most.

local t = redis.call('TIME') -- the clock of stream entries, whatever the other scripts go by
local before = t[1] * 1000 + math.floor(t[2] / 1000) - tonumber(ARGV[1])
return redis.call('XRANGE', KEYS[1], '-', string.format('%d', before), 'COUNT', ARGV[2])
