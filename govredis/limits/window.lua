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
-- microseconds. A denial writes nothing.

local mode, cost, member = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now, limits = clock(ARGV[4]), {unpack(ARGV, 5)}

-- The same call, arriving again: it has been admitted already, whatever has come since.
local again = mode == 'hit' and redis.call('ZSCORE', KEYS[1], member .. '-1')
local found = look(now, limits, again and 0 or cost, nil, again or mode == 'record')

if found.admitted and mode ~= 'peek' and not again then write(now, limits, now, cost, member) end

return {found.admitted and 1 or 0, found.deciding, found.least, found.wait, reset_after(now, limits, found.deciding)}
