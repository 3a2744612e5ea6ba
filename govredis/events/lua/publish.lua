-- Publish an event once, also where the command arrives twice. After append.lua, which has the first two keys and arguments.
--
-- A publisher's lane publishes one event after the other, and counts them.
--
-- KEYS[3]  its sibling "lane:{lane}": the count of the lane's last event
-- ARGV[3]  the lane's count of this event
-- ARGV[4]  topic
-- ARGV[5]  the event's id
-- ARGV[6]  entity, or ""
-- ARGV[7]  payload
-- ARGV[8]  how long a lane is remembered, in milliseconds
--
-- Reply: 1; 0 if it had arrived before.

if (tonumber(redis.call('GET', KEYS[3]) or '') or 0) >= tonumber(ARGV[3]) then return 0 end
local failed = append(ARGV[4], ARGV[5], ARGV[6], '', ARGV[7])
if failed then return failed end
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[8])
return 1
