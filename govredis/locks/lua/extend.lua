-- Give a holder a new lease.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  fencing token of the caller
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
--
-- Reply: 1 if extended, 0 if lost. The caller's lease still runs, by its own clock. If its key went with other data (a
-- FLUSHALL, a restart or a failover to older data), it gets the key back, unless somebody has held the lock since. The
-- fence is gone then, or older, or from a lease that has ended. If the fence is the caller's own, and its expiry says that
-- the lease still runs, the key alone was taken away (a DEL, an eviction): the caller does not get it back.

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if not holder then
  local last, token = tonumber(redis.call('GET', KEYS[2])) or 0, tonumber(ARGV[3])
  if last > token then return 0 end
  if last == token and redis.call('PTTL', KEYS[2]) > tonumber(ARGV[4]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'PX', string.format('%d', ARGV[2] + ARGV[4]))
return 1
