-- How many entries there are within a window: in the log, or in the counter of just that window; the larger number, if
-- there are both. After clock.lua, log.lua and counter.lua.
--
-- KEYS[1]  the ZSET of window.lua
-- KEYS[2]  the HASH of counter_window.lua
-- ARGV[1]  the window in microseconds
-- ARGV[2]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: the count. An error, SCORE or COUNTER, where another client has planted something impossible.

local now, window = clock(ARGV[2]), tonumber(ARGV[1])
local wrong = no_time(last_score())
if wrong then return wrong end
local counter = unfold(redis.call('HGET', KEYS[2], ARGV[1]), window, now)
if counter.wrong then return counter.wrong end
return math.max(redis.call('ZCOUNT', KEYS[1], after(now - window), '+inf'), counter.used)
