-- Decide and record over several limits at once, or only look. After clock.lua and log.lua.
--
-- KEYS[1]  the log; log.lua has the others
-- ARGV[1]  mode: "hit" (decide, record if admitted), "peek" (decide, write nothing), "record" (record, unasked)
-- ARGV[2]  cost: whole entries
-- ARGV[3]  member: unique to the call, so that a hit which arrives twice counts once
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  limit, ARGV[6] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after}, times in
-- microseconds. A denial writes nothing. An error, SCORE, for a log with scores that are no times.

local mode, cost, member = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now, limits = clock(ARGV[4]), {unpack(ARGV, 5)}

local last = last_score_from(now)
local wrong = no_time(last)
if wrong then return wrong end

local admitted, deciding, least, wait, longest, old = look(now, limits, cost, nil, mode == 'record')
local again, newest
if mode ~= 'peek' then
  if admitted then
    local added
    added, newest = write(now, longest, old, now, cost, member, last)
    again = added == 0
  else
    again = redis.call('ZSCORE', KEYS[1], member .. '-1')
  end
end
if again then
  -- The same call, arriving again: it has been admitted already, whatever has come since.
  admitted, deciding, least, wait = look(now, limits, 0, nil, true)
end
if again or not newest then newest = microseconds(last_score() or 0) end

return {admitted and 1 or 0, deciding, least, wait, reset_after(now, tonumber(limits[2 * deciding]), newest)}
