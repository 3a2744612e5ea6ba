-- Who was denied how often, in this hour and in the one before.
--
-- KEYS[1]  the hash tag of denied.lua's ZSETs
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: {members and counts of this hour, those of the hour before}, each a flat list.

local now = tonumber(ARGV[1])
if not now then now = tonumber(redis.call('TIME')[1]) * 1000000 end
local hour = math.floor(now / (3600 * 1000000))
local this = KEYS[1] .. ':' .. string.format('%d', hour)
local before = KEYS[1] .. ':' .. string.format('%d', hour - 1)
return {redis.call('ZRANGE', this, 0, -1, 'WITHSCORES'), redis.call('ZRANGE', before, 0, -1, 'WITHSCORES')}
