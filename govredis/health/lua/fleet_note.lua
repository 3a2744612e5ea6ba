-- Note that a process of Celery lives, or what it has found.
--
-- KEYS[1]  govredis:fleet, a hash: "worker:{name}", "beat:{name}" or "queues:{broker}" to "{first} {last} {JSON}", when
--          it was noted first and last, in milliseconds of the server's clock
-- ARGV[1]  a field
-- ARGV[2]  its JSON
-- ARGV[3]  ttl of the hash in milliseconds
-- ARGV[4]  another field
--
-- Reply: the milliseconds since the other field was noted; -1 if it never was.

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local held = redis.call('HMGET', KEYS[1], ARGV[1], ARGV[4])

local first = string.match(held[1] or '', '^(%d+) ') or string.format('%d', now)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s %d %s', first, now, ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local other = string.match(held[2] or '', '^%d+ (%d+) ')
return other and now - tonumber(other) or -1
