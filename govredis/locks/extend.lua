-- Give a holder a new lease.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  fencing token of the caller
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
--
-- Reply: 1 if extended, 0 if lost. A holder whose lease still runs, by its own clock, gets a lost key back (a restart
-- without data, a FLUSHALL) unless somebody has held the lock since, which the fence tells.

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if not holder and (tonumber(redis.call('GET', KEYS[2])) or 0) > tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'PX', string.format('%d', ARGV[2] + ARGV[4]))
return 1
