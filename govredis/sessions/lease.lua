-- Take a lease: who holds it when it comes to `fill`, has missed nothing. Readers and writers of a session share one.
--
-- KEYS[1]  the sibling :lease
-- ARGV[1]  a new lease
-- ARGV[2]  how long it is good for, in milliseconds
--
-- Reply: the lease to use.

local lease = redis.call('GET', KEYS[1]) or ARGV[1]
redis.call('SET', KEYS[1], lease, 'PX', ARGV[2])
return lease
