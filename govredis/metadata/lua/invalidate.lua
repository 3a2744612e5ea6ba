-- Delete a value, take the lease away from its loader, and leave a tombstone.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "stamp"
-- KEYS[3]  its sibling "lease"
-- KEYS[4]  its sibling "tombstone"
-- KEYS[5]  its sibling "stale"
-- ARGV[1]  the version of the write, or "": a value whose stamp has this version, or a later one, stays
-- ARGV[2]  how long the tombstone stands, in milliseconds
--
-- Reply: 1 if a value was deleted, else 0.

local stamp = redis.pcall('GET', KEYS[2])  -- an error where it is no string: then it is foreign
local digest, held
if type(stamp) == 'string' then digest, held = string.match(stamp, '^(%x+) %S+ %S+ %S+ %S+ (%d+)$') end
local keeps = held and #held <= 16 and ARGV[1] ~= '' and tonumber(held) >= tonumber(ARGV[1])
if keeps then
  local value = redis.pcall('GET', KEYS[1])
  keeps = type(value) == 'string' and redis.sha1hex(value) == digest
end

-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[3])
local had = 0
if not keeps then
  had = redis.call('DEL', KEYS[1])
  redis.call('DEL', KEYS[2], KEYS[5])
end

-- The newest version stands; but where one is unknown, it may be any: "". A key that is no tombstone is written over.
local stone = redis.pcall('GET', KEYS[4])
if type(stone) ~= 'string' or #stone > 16 or not string.match(stone, '^%d*$') then stone = false end
local version = ARGV[1]
if stone and version ~= '' and (stone == '' or tonumber(stone) > tonumber(version)) then version = stone end
redis.call('SET', KEYS[4], version, 'PX', ARGV[2])
return had
