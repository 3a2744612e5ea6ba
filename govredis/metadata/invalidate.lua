-- Delete a value, take the lease away from whoever is loading it, and leave a tombstone.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "lease"
-- KEYS[3]  its sibling "tombstone"
-- ARGV[1]  what the tombstone says: the version of the write, or ""
-- ARGV[2]  how long it stands, in milliseconds
--
-- Reply: 1 if there was a value, else 0.

-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[2])
local had = redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
return had
