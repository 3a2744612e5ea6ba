-- After a miss: take a lease, so that what is loaded now may be stored if nothing intervenes.
--
-- KEYS[1]  the value's sibling "lease"
-- ARGV[1]  a lease, unique to the call
-- ARGV[2]  how long it stands, in milliseconds
--
-- Reply: the lease to fill with. Readers that miss at the same time share one: what any of them loads after taking it
-- is as fresh as the others'. An invalidation takes it away from all of them.
-- Leases: Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, section 3.2.1.

local lease = redis.call('GET', KEYS[1])
if lease then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return lease
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
