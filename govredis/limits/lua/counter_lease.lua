-- Decide as counter_window.lua does in mode "hit"; and where more is left than the call needs, lease some of it to the
-- caller: a lease counts in the bucket of its end. After clock.lua, counter.lua and counter_limits.lua.
--
-- KEYS[1]  the HASH of counter_limits.lua. A lease of another origin than is there was forgotten with its counters
-- ARGV[1]  cost of the call
-- ARGV[2]  wanted: how much the caller takes at most, the call's cost included
-- ARGV[3]  how long the lease lasts, in microseconds
-- ARGV[4]  member: unique to the call
-- ARGV[5]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[6]  how much of an earlier lease the caller gives back before that
-- ARGV[7]  a name for that, so that it counts once; ARGV[8] the time at which that lease counts; ARGV[9] its origin
-- ARGV[10] limit, ARGV[11] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, how much the
-- caller got, the time at which that counts, its origin}. Times are microseconds. Half of the rest is leased at most, so
-- that others find some. A denial writes nothing. An error, COUNTER, where another client has written an impossible counter.

local cost, wanted, lease, member = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local now, limits = clock(ARGV[5]), {unpack(ARGV, 10)}

local windows = windows_of(limits)
local held = redis.call('HMGET', KEYS[1], 'calls', 'origin', unpack(windows))
if ARGV[9] == held[2] then take_back(held, windows, tonumber(ARGV[6]), tonumber(ARGV[8]), '-' .. ARGV[7], now) end
local calls, origin = held[1], held[2] or member

-- The same call, arriving again. It got as much as it needed at least; the rest ages out.
local again = noted(calls, member)
local counters, admitted, deciding, least, wait = decide(limits, held, again and 0 or cost, again, false, now)
if not counters then return admitted end

local granted, at = 0, now
if again then
  granted = cost
elseif admitted then
  local more = math.min(wanted - cost, math.floor(least / 2))
  granted, least = cost + more, least - more
  if more > 0 then at = now + lease end
  count(counters, windows, granted, at, now, {'calls', note(calls, member), 'origin', origin}, #windows + 2)
end

local reset_after = until_empty(counters[deciding], now)
return {admitted and 1 or 0, deciding, math.max(0, least), wait, reset_after, granted, at, origin}
