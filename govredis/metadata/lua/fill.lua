-- Store a value: under a lease, or, without one (a public set), unless a tombstone stands.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "stamp"
-- KEYS[3]  its sibling "lease"
-- KEYS[4]  its sibling "tombstone"
-- KEYS[5]  its sibling "stale", a copy for the time after its ttl
-- ARGV[1]  the value to store, or "": there is known to be none
-- ARGV[2]  its stamp
-- ARGV[3]  its ttl in milliseconds
-- ARGV[4]  the ttl of the copy, or "0" for no copy
-- ARGV[5]  the lease taken before it was loaded, or "" for none
-- ARGV[6]  under a lease: the SHA-1 of what stood at the value's key when it was taken, "" for nothing
-- ARGV[7]  the value's version, or "" where it is not known
-- ARGV[8]  how long a tombstone may stand at most, in milliseconds: a key that stands longer is none
--
-- Reply: 1 if stored, 0 if refused. It is refused after an invalidation or the loss of the lease. It is refused, too,
-- if a client that takes no leases has set or deleted the value, or if it was read where the newest write had not
-- arrived.
--
-- A value that has expired since the lease was taken looks deleted: it is loaded once more. A SET of the bytes that
-- stood there before is not noticed, nor is a DEL where nothing was.

local stone = redis.pcall('GET', KEYS[4])  -- an error where it is no string: then it is foreign
if type(stone) ~= 'string' or #stone > 16 or not string.match(stone, '^%d*$') then stone = false end
if stone then
  local left = redis.call('PTTL', KEYS[4])
  if left < 0 or left > tonumber(ARGV[8]) then stone = false end
end
local compared = stone and stone ~= '' and ARGV[7] ~= ''
if compared and tonumber(ARGV[7]) < tonumber(stone) then return 0 end
if ARGV[5] ~= '' then
  if redis.pcall('GET', KEYS[3]) ~= ARGV[5] then return 0 end
  local value = redis.pcall('GET', KEYS[1])
  local stands = ''
  if type(value) == 'string' then stands = redis.sha1hex(value) elseif value then stands = 'another type' end
  if stands ~= ARGV[6] then
    redis.call('DEL', KEYS[3])
    return 0
  end
elseif stone and not compared then
  return 0
end

if ARGV[1] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
if ARGV[4] == '0' then
  redis.call('DEL', KEYS[5])
else
  redis.call('SET', KEYS[5], ARGV[2] .. ' ' .. ARGV[1], 'PX', ARGV[4])
end
redis.call('DEL', KEYS[3])  -- nobody waits for it now, and a value that another has loaded meanwhile may be older
return 1
