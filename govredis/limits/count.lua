-- How many entries there are within a window: in the log, or in the counter of just that window; the larger number, if
-- there are both. After clock.lua and counter.lua.
--
-- KEYS[1]  the ZSET of window.lua
-- KEYS[2]  the HASH of counter_window.lua
-- ARGV[1]  the window in microseconds
-- ARGV[2]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: the count.

local now, window = clock(ARGV[2]), tonumber(ARGV[1])
local since = now - window
local logged = redis.call('ZCOUNT', KEYS[1], string.format('(%d.%06d', math.floor(since / 1000000), since % 1000000), '+inf')
return math.max(logged, unfold(redis.call('HGET', KEYS[2], ARGV[1]), window, now).used)
