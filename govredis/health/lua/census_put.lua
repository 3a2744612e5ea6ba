-- Put back the census, with what was counted.
--
-- KEYS[1]  govredis:census, see census_take.lua
-- ARGV[1]  the process that has taken it
-- ARGV[2]  the round under way; "" where it has ended
-- ARGV[3]  the whole round, where it has ended; else ""
-- ARGV[4]  milliseconds until the next round may begin
-- ARGV[5]  ttl in milliseconds
--
-- Reply: 1; 0 if another process has taken it since: it counts the same keys, and this count is dropped.

if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'holder', 'free_at')
if ARGV[2] == '' then
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  redis.call('HDEL', KEYS[1], 'round')
  redis.call('HSET', KEYS[1], 'last', ARGV[3], 'rests_until', string.format('%d', now + ARGV[4]))
else
  redis.call('HSET', KEYS[1], 'round', ARGV[2])
end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
