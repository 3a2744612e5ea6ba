-- Note a session in its agent's index, before the session itself is written: the index may name a session too many,
-- never one too few.
--
-- KEYS[1]  agent_sessions:{agent}, a ZSET of session ids scored with when they expire, in server seconds
-- ARGV[1]  session id
-- ARGV[2]  ttl in milliseconds
--
-- Reply: 1.

local time = redis.call('TIME')
local now, ttl = tonumber(time[1]), tonumber(ARGV[2])
-- The session is written after this, so its expiry is later than the one noted by as long as that takes. So keep it
-- in the index for one minute more than that.
local expires = now + math.ceil(ttl / 1000) + 60
local pruned = redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now))
if type(pruned) == 'table' then redis.call('DEL', KEYS[1]) end  -- another client's, of another type
redis.call('ZADD', KEYS[1], 'GT', string.format('%d', expires), ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left < ttl + 60000 then redis.call('PEXPIRE', KEYS[1], string.format('%d', ttl + 60000)) end
return 1
