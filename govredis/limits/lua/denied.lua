-- Count denials by identity, in a ZSET for each hour that keeps a bounded number of members: Space-Saving. A new member for
-- which there is no room takes the place of the least, and its count too. After clock.lua.
--
-- KEYS[1]  the hash tag of the ZSETs, {...}: the hour's number since 1970 follows it
-- ARGV[1]  how many members there is room for
-- ARGV[2]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[3]  a member, ARGV[4] how often it was denied, and so on in pairs
--
-- Reply: 1. A call that arrives twice counts twice: counts are bounds from above.

local HOUR = 3600 * 1000000
-- As in denied_counts.py.
local MOST = 1000000000000

local now = clock(ARGV[2])
local denied = KEYS[1] .. ':' .. string.format('%d', math.floor(now / HOUR))

for i = 3, #ARGV, 2 do
  local member, count = ARGV[i], tonumber(ARGV[i + 1])
  if not redis.call('ZSCORE', denied, member) and redis.call('ZCARD', denied) >= tonumber(ARGV[1]) then
    -- Another client's count may be negative, or infinite.
    count = count + math.max(0, math.min(MOST, tonumber(redis.call('ZPOPMIN', denied)[2])))
  end
  redis.call('ZINCRBY', denied, string.format('%d', count), member)
end
redis.call('PEXPIRE', denied, 2 * HOUR / 1000)
return 1
