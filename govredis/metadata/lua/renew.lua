-- Have a lease stand for longer, while the load goes on that it was taken for.
--
-- KEYS[1]  the value's sibling "lease"
-- ARGV[1]  the lease
-- ARGV[2]  how long it stands from now, in milliseconds
--
-- Reply: 1 if it stood, else 0: it was taken away, or has ended.

if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
