-- A session's row has changed: what is in the cache is over, and what was read before is not to be put there.
--
-- KEYS[1]  session:{id}
-- KEYS[2]  the sibling :lease
-- KEYS[3]  the sibling :version, of the newest row that was told of here
-- ARGV[1]  the row's version
-- ARGV[2]  how long that is remembered, in milliseconds
-- ARGV[3]  what was at the key when it was found to be over; what came since stays. "*": whatever is there, but a copy of
--          that version or a newer one
--
-- Reply: 1 if there was something and is gone, else 0.

local version = tonumber(ARGV[1])
local held = redis.call('GET', KEYS[1])
if ARGV[3] ~= '*' then
  if held ~= ARGV[3] then return 0 end
else
  local copied = held and string.match(held, '"__govredis__": {"epoch": %d+, "version": (%d+)}}$')
  if copied and tonumber(copied) >= version then return 0 end
end
-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[2])
local had = redis.call('DEL', KEYS[1])
if tonumber(redis.call('GET', KEYS[3]) or '0') < version then redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2]) end
return had
