-- The denials counted by identity in this hour, and in the one before. After clock.lua.
--
-- KEYS[1]  denied.lua's ZSET of an hour, KEYS[2] that of the next hour, KEYS[3] and KEYS[4] those of the two after: the third
--          is this hour by the caller's clock
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[2]  the number of the first hour since 1970
--
-- Reply: {members and counts of this hour, those of the hour before}, each a flat list.

local hour = math.floor(clock(ARGV[1]) / (3600 * 1000000)) - tonumber(ARGV[2])
local before, this = KEYS[2], KEYS[3]
if hour < 2 then before, this = KEYS[1], KEYS[2] elseif hour > 2 then before, this = KEYS[3], KEYS[4] end
return {redis.call('ZRANGE', this, 0, -1, 'WITHSCORES'), redis.call('ZRANGE', before, 0, -1, 'WITHSCORES')}
