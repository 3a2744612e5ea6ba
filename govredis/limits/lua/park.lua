-- Park a message, once for each time that its run is parked. After clock.lua.
--
-- KEYS[1]  the set of the brokers for which something was ever parked
-- KEYS[2]  its sibling "due:{broker}": a ZSET of entries, scored by the microsecond they are due at, an even number; an
--          odd score marks entries that are published whether they are due or not
-- KEYS[3]  its sibling "messages:{broker}": a hash of the messages by entry
-- KEYS[4]  the run's ticket: "{times parked}:{publication that has arrived, or nothing}"
-- KEYS[5]  its sibling "aside:{broker}": see set_aside.lua
-- ARGV[1]  broker
-- ARGV[2]  entry, without the ":{times parked}" that it ends in
-- ARGV[3]  times parked, this time included
-- ARGV[4]  microseconds until it is due
-- ARGV[5]  message
-- ARGV[6]  how long the ticket is kept beyond that, in milliseconds
-- ARGV[7]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: 1; 0 if this time it was parked already, also if it has been published since.

local times = tonumber(ARGV[3])
-- Another client may have planted something that is no ticket: it counts as none.
local parked = tonumber(string.match(redis.call('GET', KEYS[4]) or '', '^(%d%d?%d?%d?%d?%d?):')) or 0
if parked >= times then return 0 end

local now = clock(ARGV[7])
local wait = tonumber(ARGV[4])
redis.call('SET', KEYS[4], ARGV[3] .. ':', 'PX', string.format('%d', wait / 1000 + tonumber(ARGV[6])))
redis.call('SADD', KEYS[1], ARGV[1])
local due = now + wait
redis.call('ZADD', KEYS[2], string.format('%d', due + due % 2), ARGV[2] .. ':' .. ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2] .. ':' .. ARGV[3], ARGV[5])
-- The entry of the time before may still be there: its publisher has not come to remove it.
redis.call('ZREM', KEYS[2], ARGV[2] .. ':' .. parked)
redis.call('HDEL', KEYS[3], ARGV[2] .. ':' .. parked)
redis.call('HDEL', KEYS[5], ARGV[2] .. ':' .. parked)
return 1
