-- The contents of an identity's windows. After clock.lua, log.lua and counter.lua.
--
-- KEYS[1]  the log, and its sibling "window" after it: see log.lua. Without the latter, all of it counts
-- KEYS[3]  the HASH of counter_window.lua
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: {now, the longest window or 0, entries within it, score of the oldest, of the newest, {a counter's window, its
-- count, and so on}}, times in microseconds, scores in seconds. An error, SCORE or COUNTER, where another client has
-- planted something impossible.

local now = clock(ARGV[1])
local newest = last_score()
local wrong = no_time(newest)
if wrong then return wrong end
local longest = longest_used()
local since = longest > 0 and after(now - longest) or '-inf'

local counters = {}
for _, field in ipairs(redis.call('HKEYS', KEYS[3])) do
  local window = window_of(field)
  if window then
    local counter = unfold(redis.call('HGET', KEYS[3], field), window, now)
    if counter.wrong then return counter.wrong end
    if counter.used > 0 then
      counters[#counters + 1] = field
      counters[#counters + 1] = string.format('%d', counter.used)
    end
  end
end

local entries = redis.call('ZCOUNT', KEYS[1], since, '+inf')
local oldest = redis.call('ZRANGEBYSCORE', KEYS[1], since, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2] or ''
return {now, longest, entries, oldest, newest or '', counters}
