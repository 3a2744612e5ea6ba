-- Put a lock on the list of those that are held, or keep it there. What has ended goes.
--
-- KEYS[1]  govredis:locks: what is held, by the end of its lease in milliseconds of the server's clock
-- ARGV[1]  the entry
-- ARGV[2]  ttl in milliseconds
--
-- Reply: how many have gone.

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local gone = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now_ms))
redis.call('ZADD', KEYS[1], string.format('%d', now_ms + ARGV[2]), ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return gone
