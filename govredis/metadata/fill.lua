-- Store a value: under a lease, or, without one (a public set), unless a tombstone stands.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "lease"
-- KEYS[3]  its sibling "tombstone"
-- ARGV[1]  the value to store
-- ARGV[2]  its ttl in milliseconds
-- ARGV[3]  the lease taken before it was loaded, or "" for none
-- ARGV[4]  the value's version, or "" where it is not known
--
-- Reply: 1 if stored, 0 if refused: an invalidation (or the loss of the lease) came between, or the value was read from
-- where the newest write had not arrived.

local stone = redis.call('GET', KEYS[3])
local compared = stone and stone ~= '' and ARGV[4] ~= ''
if compared and tonumber(ARGV[4]) < tonumber(stone) then return 0 end
if ARGV[3] ~= '' then
  if redis.call('GET', KEYS[2]) ~= ARGV[3] then return 0 end
elseif stone and not compared then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('DEL', KEYS[2])  -- nobody is to wait for it, and what another has loaded meanwhile may be older
return 1
