-- Park a message, once for each time that its run is parked.
--
-- KEYS[1]  the ZSET of what is parked: entries, scored by the microsecond they are due at
-- KEYS[2]  its sibling "messages": a hash of the messages by entry
-- KEYS[3]  the run's ticket: "{times parked}:{publication that has arrived, or nothing}"
-- ARGV[1]  entry, without the ":{times parked}" that it ends in
-- ARGV[2]  times parked, this one included
-- ARGV[3]  due in so many microseconds
-- ARGV[4]  message
-- ARGV[5]  how long the ticket is kept beyond that, in milliseconds
-- ARGV[6]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: 1; 0 if this time it was parked already, also if it has been published since.

local times = tonumber(ARGV[2])
local parked = tonumber(string.match(redis.call('GET', KEYS[3]) or '', '^%d+')) or 0
if parked >= times then return 0 end

local now = tonumber(ARGV[6])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local wait = tonumber(ARGV[3])
redis.call('SET', KEYS[3], ARGV[2] .. ':', 'PX', string.format('%d', wait / 1000 + tonumber(ARGV[5])))
redis.call('ZADD', KEYS[1], string.format('%d', now + wait), ARGV[1] .. ':' .. ARGV[2])
redis.call('HSET', KEYS[2], ARGV[1] .. ':' .. ARGV[2], ARGV[4])
-- The time before, where who published it has not come to remove it.
redis.call('ZREM', KEYS[1], ARGV[1] .. ':' .. parked)
redis.call('HDEL', KEYS[2], ARGV[1] .. ':' .. parked)
return 1
