-- What stands in an identity's windows. After clock.lua and counter.lua.
--
-- KEYS[1]  the ZSET of window.lua
-- KEYS[2]  its sibling: the longest window ever used on it, in microseconds; without, all of it counts
-- KEYS[3]  the HASH of counter_window.lua
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: {now, the longest window or 0, entries within it, score of the oldest, of the newest, {a counter's window, its
-- count, and so on}}, times in microseconds, scores in seconds.

local now = clock(ARGV[1])
local longest = redis.call('GET', KEYS[2])
local since = '-inf'
if longest then
  since = now - tonumber(longest)
  since = string.format('(%d.%06d', math.floor(since / 1000000), since % 1000000)
end

local counters = {}
for _, field in ipairs(redis.call('HKEYS', KEYS[3])) do
  if field ~= 'calls' then
    local used = unfold(redis.call('HGET', KEYS[3], field), tonumber(field), now).used
    if used > 0 then
      counters[#counters + 1] = field
      counters[#counters + 1] = string.format('%d', used)
    end
  end
end

local entries = redis.call('ZCOUNT', KEYS[1], since, '+inf')
local oldest = redis.call('ZRANGEBYSCORE', KEYS[1], since, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2] or ''
local newest = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or ''
return {now, tonumber(longest or '0'), entries, oldest, newest, counters}
