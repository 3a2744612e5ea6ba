-- Decide and count over several limits at once, or only look: window.lua, for counters. After clock.lua, counter.lua and
-- counter_limits.lua.
--
-- KEYS[1]  the HASH of counter_limits.lua
-- ARGV[1]  mode: "hit" (decide, count if admitted), "peek" (decide, write nothing), "record" (count, unasked)
-- ARGV[2]  cost
-- ARGV[3]  member: unique to the call. A call that arrives again while it is among the latest, about 15, counts once
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  limit, ARGV[6] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, now}, times in
-- microseconds. A denial writes nothing. An error, COUNTER, where another client has written an impossible counter.

local mode, cost, member = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now, limits = clock(ARGV[4]), {unpack(ARGV, 5)}

local windows = windows_of(limits)
local held = redis.call('HMGET', KEYS[1], 'calls', 'origin', unpack(windows))
local calls = held[1]

local again = mode == 'hit' and noted(calls, member)
local counters, admitted, deciding, least, wait =
  decide(limits, held, again and 0 or cost, again or mode == 'record', true, now)
if not counters then return admitted end

if admitted and mode ~= 'peek' and not again then
  count(counters, windows, cost, now, now, {'calls', note(calls, member)}, #windows + (held[2] and 2 or 1))
end

return {admitted and 1 or 0, deciding, math.max(0, least), wait, until_empty(counters[deciding], now), now}
