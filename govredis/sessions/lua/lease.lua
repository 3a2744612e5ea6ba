-- Take a fill lease. If it still stands at the fill, no change was missed. Readers and writers of a session share it.
--
-- KEYS[1]  the sibling :lease
-- ARGV[1]  a new lease
-- ARGV[2]  how long it lasts, in milliseconds
--
-- Reply: the lease to use.

local lease = text(KEYS[1]) or ARGV[1]
redis.call('SET', KEYS[1], lease, 'PX', ARGV[2])
return lease
