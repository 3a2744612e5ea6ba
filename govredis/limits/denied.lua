-- Count denials by whom they were given to, in a ZSET for each hour that keeps a bounded number of them: Space-Saving. One
-- that is new where there is no room takes the place of the least, and its count too.
--
-- KEYS[1]  the hash tag of the ZSETs, {...}: the hour's number since 1970 follows it
-- ARGV[1]  how many members there is room for
-- ARGV[2]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[3]  a member, ARGV[4] how often it was denied, and so on in pairs
--
-- Reply: 1. What arrives twice counts twice: counts are bounds from above.

local HOUR = 3600 * 1000000

local now = tonumber(ARGV[2])
if not now then now = tonumber(redis.call('TIME')[1]) * 1000000 end
local denied = KEYS[1] .. ':' .. string.format('%d', math.floor(now / HOUR))

for i = 3, #ARGV, 2 do
  local member, count = ARGV[i], tonumber(ARGV[i + 1])
  if not redis.call('ZSCORE', denied, member) and redis.call('ZCARD', denied) >= tonumber(ARGV[1]) then
    count = count + tonumber(redis.call('ZPOPMIN', denied)[2])
  end
  redis.call('ZINCRBY', denied, string.format('%d', count), member)
end
redis.call('PEXPIRE', denied, 2 * HOUR / 1000)
return 1
