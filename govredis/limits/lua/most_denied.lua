-- The denials counted by identity in this hour, and in the one before. After clock.lua.
--
-- KEYS[1]  the hash tag of denied.lua's ZSETs
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: {members and counts of this hour, those of the hour before}, each a flat list.

local now = clock(ARGV[1])
local hour = math.floor(now / (3600 * 1000000))
local this = KEYS[1] .. ':' .. string.format('%d', hour)
local before = KEYS[1] .. ':' .. string.format('%d', hour - 1)
return {redis.call('ZRANGE', this, 0, -1, 'WITHSCORES'), redis.call('ZRANGE', before, 0, -1, 'WITHSCORES')}
