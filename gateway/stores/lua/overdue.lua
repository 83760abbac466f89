-- Requests that nobody keeps up. KEYS: deadlines. ARGV: how many at most. → their ids

return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', clock(), 'LIMIT', 0, ARGV[1])
