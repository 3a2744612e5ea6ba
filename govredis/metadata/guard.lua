-- Write the guard, unless somebody else has since it was read.
--
-- KEYS[1]  the guard
-- ARGV[1]  what it was when it was read, or "" for nothing
-- ARGV[2]  what it shall be
--
-- Reply: 1 if it is that now, else 0.

local held = redis.call('GET', KEYS[1]) or ''
if held == ARGV[2] then return 1 end
if held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
