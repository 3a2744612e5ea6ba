-- Count denials by identity, in a ZSET for each hour that keeps a bounded number of members: Space-Saving. A new member for
-- which there is no room takes the place of the least, and its count too. After clock.lua.
--
-- KEYS[1]  the ZSET of an hour, KEYS[2] that of the next hour, KEYS[3] that of the hour after: the second is this hour by
--          the caller's clock. An hour of the server's clock that is none of these counts as the one nearest to it
-- ARGV[1]  how many members there is room for
-- ARGV[2]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[3]  the number of the first hour since 1970
-- ARGV[4]  a member, ARGV[5] how often it was denied, and so on in pairs
--
-- Reply: 1. A call that arrives twice counts twice: counts are bounds from above.

local HOUR = 3600 * 1000000
-- As in denied_counts.py.
local MOST = 1000000000000

local hour = math.floor(clock(ARGV[2]) / HOUR) - tonumber(ARGV[3])
local denied = KEYS[2]
if hour < 1 then denied = KEYS[1] elseif hour > 1 then denied = KEYS[3] end

for i = 4, #ARGV, 2 do
  local member, count = ARGV[i], tonumber(ARGV[i + 1])
  if not redis.call('ZSCORE', denied, member) and redis.call('ZCARD', denied) >= tonumber(ARGV[1]) then
    -- Another client's count may be negative, or infinite.
    count = count + math.max(0, math.min(MOST, tonumber(redis.call('ZPOPMIN', denied)[2])))
  end
  redis.call('ZINCRBY', denied, string.format('%d', count), member)
end
redis.call('PEXPIRE', denied, 2 * HOUR / 1000)
return 1
