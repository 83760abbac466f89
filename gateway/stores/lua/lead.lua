-- Whether this is the one that looks for the answer, from now on for a while. KEYS: the lead. ARGV: who, milliseconds.
local who = redis.call('GET', KEYS[1])
if who and who ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
