-- Give a lease back under which nothing will be stored, so that nobody waits for it.
--
-- KEYS[1]  the value's sibling "lease"
-- ARGV[1]  the lease
--
-- Reply: 1 if it stood, else 0.

if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
