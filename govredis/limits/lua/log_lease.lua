-- Decide as window.lua does in mode "hit"; and where more is left than the call needs, lease some of it to the caller: the
-- entries of a lease stand at its end. After clock.lua and log.lua.
--
-- KEYS[1]  the log; log.lua has the others
-- ARGV[1]  cost of the call, in whole entries
-- ARGV[2]  wanted: how many entries the caller takes at most, the call's included
-- ARGV[3]  how long the lease lasts, in microseconds
-- ARGV[4]  member: unique to the call
-- ARGV[5]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[6]  how many entries of an earlier lease the caller gives back before that; ARGV[7] that lease's member; ARGV[8] the
--          highest of the entries' numbers
-- ARGV[9]  limit, ARGV[10] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, how many entries
-- the caller got}, times in microseconds. Half of the rest is leased at most, so that others find some. A denial writes
-- nothing. An error, SCORE, for a log with scores that are no times.

local cost, wanted, lease, member = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local now, limits = clock(ARGV[5]), {unpack(ARGV, 9)}

local numbers, back = tonumber(ARGV[8]), {}
for i = 1, tonumber(ARGV[6]) do back[i] = ARGV[7] .. '-' .. (numbers - i + 1) end
if #back > 0 then redis.call('ZREM', KEYS[1], unpack(back)) end

local last = last_score_from(now)
local wrong = no_time(last)
if wrong then return wrong end

local admitted, deciding, least, wait, longest, old = look(now, limits, cost, nil, false)
local granted, newest = 0, nil
if admitted then
  local more = math.min(wanted - cost, math.floor(least / 2))
  granted, least = cost + more, least - more
  newest = select(2, write(now, longest, old, more > 0 and now + lease or now, granted, member, last))
elseif redis.call('ZSCORE', KEYS[1], member .. '-1') then
  -- The same call, arriving again. It got as much as it needed at least; the rest ages out.
  admitted, deciding, least, wait = look(now, limits, 0, nil, true)
  granted = cost
end
newest = newest or microseconds(last_score() or 0)

return {admitted and 1 or 0, deciding, least, wait, reset_after(now, tonumber(limits[2 * deciding]), newest), granted}
