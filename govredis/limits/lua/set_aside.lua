-- Set aside a taken entry that cannot be published: it is not due for a while, twice as long each time. After clock.lua.
--
-- KEYS[1]  the ZSET of the entries parked for a broker; see park.lua
-- KEYS[2]  the hash of the entries that are set aside: "{tries} {why}"
-- ARGV[1]  entry
-- ARGV[2]  why
-- ARGV[3]  the while after the first try, in microseconds, ARGV[4] the longest
-- ARGV[5]  by how much it is longer this time, as a part of it, so that entries that failed together come back apart
-- ARGV[6]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: how often it was tried; 0 where it is gone.

local score = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or nil)
if not score then
  redis.call('HDEL', KEYS[2], ARGV[1])
  return 0
end
local tries = (tonumber(string.match(redis.call('HGET', KEYS[2], ARGV[1]) or '', '^(%d%d?%d?%d?%d?%d?) ')) or 0) + 1
local wait = math.min(tonumber(ARGV[4]), tonumber(ARGV[3]) * 2 ^ math.min(tries - 1, 30))
local due = math.floor(clock(ARGV[6]) + wait * (1 + tonumber(ARGV[5])))
local odd = score % 2 == 1 and 1 or 0
redis.call('ZADD', KEYS[1], string.format('%d', due - due % 2 + odd), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], string.format('%d', tries) .. ' ' .. ARGV[2])
return tries
