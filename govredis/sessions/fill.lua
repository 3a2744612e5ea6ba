-- Put a session's row, as PostgreSQL has it, into the cache, unless there is, or was, something newer.
--
-- KEYS[1]  session:{id}, a JSON object
-- KEYS[2]  the sibling :lease
-- KEYS[3]  the sibling :version, of the newest row that was told of here
-- KEYS[4]  the sibling :revoked: what is there came before the lease, and so before the row
-- ARGV[1]  the JSON object
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  the lease taken before the row was read or written: revocations end it
-- ARGV[4]  the row's version
-- ARGV[5]  how long that is remembered, in milliseconds: for longer than a lease is good
-- ARGV[6]  what was at the key before the row was read ("" for nothing): what came since is somebody else's, who has no
--          row; "*": whatever is there, it is older
--
-- Reply: 1 if it is in the cache, else 0.

if redis.call('GET', KEYS[2]) ~= ARGV[3] then return 0 end
if tonumber(redis.call('GET', KEYS[3]) or '0') > tonumber(ARGV[4]) then return 0 end
if ARGV[6] ~= '*' and (redis.call('GET', KEYS[1]) or '') ~= ARGV[6] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[3], ARGV[4], 'PX', ARGV[5])
redis.call('DEL', KEYS[4])
return 1
