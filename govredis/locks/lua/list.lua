-- Put locks on the list of held locks, or keep them there. Locks whose lease has ended are removed.
--
-- KEYS[1]  govredis:locks: the held locks, by the end of their lease in milliseconds of the server's clock
-- ARGV[1]  an entry
-- ARGV[2]  its ttl in milliseconds; then the next entry and its ttl, and so on
--
-- Reply: how many were removed.

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local gone = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now_ms))
local longest = 0
for i = 1, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], string.format('%d', now_ms + ARGV[i + 1]), ARGV[i])
  longest = math.max(longest, tonumber(ARGV[i + 1]))
end
if redis.call('PTTL', KEYS[1]) < longest then redis.call('PEXPIRE', KEYS[1], string.format('%d', longest)) end
return gone
