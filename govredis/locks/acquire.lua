-- Grant a lock, or say that it is held.
--
-- KEYS[1]  lock:{resource}: the holder's owner token, with the lease as its expiry
-- KEYS[2]  its sibling "fence": the last fencing token granted
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  floor: the last fencing token that the caller's host knows of
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
--
-- Reply: {1, fencing token} if granted (also if it was granted to this owner before: its reply was lost; then the same
-- token), {0, milliseconds until the holder's lease ends, -1 where it has no end} if held.

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return {0, redis.call('PTTL', KEYS[1])}
end

local last = tonumber(redis.call('GET', KEYS[2])) or 0
local fence = last
if not holder or last == 0 then
  -- Above all earlier ones, also where the fence was lost or the clock was set back (but not both).
  local time = redis.call('TIME')
  fence = math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]), tonumber(ARGV[3]) + 1)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], string.format('%d', fence), 'PX', string.format('%d', ARGV[2] + ARGV[4]))
return {1, fence}
