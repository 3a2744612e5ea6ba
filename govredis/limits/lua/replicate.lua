-- Record admissions of another backend, at the times at which it admitted. After clock.lua and log.lua.
--
-- KEYS[1]  the log; log.lua has the others
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[2]  the longest window of all these admissions, in microseconds
-- ARGV[3]  how many microseconds ago the first was admitted, ARGV[4] its cost, ARGV[5] its member, and so on in threes
--
-- Reply: how many of them the log did not have yet. An error, SCORE, for a log with scores that are no times.

local now, longest = clock(ARGV[1]), tonumber(ARGV[2])
local last = last_score()
local wrong = no_time(last)
if wrong then return wrong end

local written = 0
for i = 3, #ARGV, 3 do
  local at, cost, member = now - tonumber(ARGV[i]), tonumber(ARGV[i + 1]), ARGV[i + 2]
  -- An admission that arrives again keeps its time.
  if not redis.call('ZSCORE', KEYS[1], member .. '-1') then
    -- It may lie before the window itself.
    local _, newest = write(now, longest, 1, at, cost, member, last)
    last = seconds(newest)
    written = written + 1
  end
end
return written
