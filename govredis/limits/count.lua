-- How many entries a sliding window log has within a window.
--
-- KEYS[1]  the ZSET of window.lua
-- ARGV[1]  the window in microseconds
-- ARGV[2]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: the count.

local now = tonumber(ARGV[2])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local since = now - tonumber(ARGV[1])
return redis.call('ZCOUNT', KEYS[1], string.format('(%d.%06d', math.floor(since / 1000000), since % 1000000), '+inf')
