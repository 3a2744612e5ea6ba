-- Delete a value, take the lease away from whoever is loading it, and leave a tombstone.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "lease"
-- KEYS[3]  its sibling "tombstone"
-- ARGV[1]  the version of the write, or "": a value that says it is of this version, or a later one, stays
-- ARGV[2]  how long the tombstone stands, in milliseconds
--
-- Reply: 1 if a value was deleted, else 0.

local value = redis.pcall('GET', KEYS[1])  -- an error where it is no string: then it is foreign
local held = type(value) == 'string'
  and string.match(value, '"__govredis__": {[^{}]*"version": (%d+)}}$')
local keeps = held and ARGV[1] ~= '' and tonumber(held) >= tonumber(ARGV[1])

-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[2])
local had = 0
if not keeps then had = redis.call('DEL', KEYS[1]) end

-- The newest version stands; but where one is unknown, it may be any: "".
local stone = redis.call('GET', KEYS[3])
local version = ARGV[1]
if stone and version ~= '' and (stone == '' or tonumber(stone) > tonumber(version)) then version = stone end
redis.call('SET', KEYS[3], version, 'PX', ARGV[2])
return had
