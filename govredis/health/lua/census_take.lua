-- Take the census for a while, unless another process has it, or the last round has ended a moment ago.
--
-- KEYS[1]  govredis:census, a hash. Its fields: holder, the process that counts; free_at, when others may take it;
--          round, the round under way; last, the last whole round; rests_until, when the next round may begin
-- ARGV[1]  the process
-- ARGV[2]  milliseconds for which it may count
--
-- Reply: {the server's time in milliseconds, the round under way, "" for none}; {} if it may not count now.

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local held = redis.call('HMGET', KEYS[1], 'free_at', 'round', 'rests_until')

if now < (tonumber(held[1] or '') or 0) then return {} end
if not held[2] and now < (tonumber(held[3] or '') or 0) then return {} end
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'free_at', string.format('%d', now + ARGV[2]))
return {string.format('%d', now), held[2] or ''}
