-- After a miss: take a lease, so that what is loaded now may be stored if nothing intervenes.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "lease"
-- ARGV[1]  a lease, unique to the call
-- ARGV[2]  how long it stands, in milliseconds
--
-- Reply: {the lease to fill with, 1 if it was taken by this call, else 0, the value or ""}. Who finds one taken may wait
-- for what its taker stores, or load under the same: what is loaded after taking it is as fresh as what the taker loads.
-- An invalidation takes it away from all of them. Who takes it finds what was stored since its miss. A call that arrives
-- twice has taken it once.
-- Leases: Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, section 3.2.1.

local lease = redis.call('GET', KEYS[2])
if lease and lease ~= ARGV[1] then
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
  return {lease, 0, ''}
end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
local value = redis.pcall('GET', KEYS[1])  -- an error where it is no string: then it is foreign
return {ARGV[1], 1, type(value) == 'string' and value or ''}
