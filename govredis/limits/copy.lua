-- Write what another store has admitted, at the times at which it did. After clock.lua and log.lua.
--
-- KEYS[1]  the log; log.lua has the others
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[2]  the longest window of all of it, in microseconds
-- ARGV[3]  how many microseconds ago the first was admitted, ARGV[4] its cost, ARGV[5] its member, and so on in threes
--
-- Reply: how many of them the log did not have yet.

local now, limits = clock(ARGV[1]), {1, ARGV[2]}
local written = 0
for i = 3, #ARGV, 3 do
  local ago, cost, member = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  -- One that arrives again keeps its time.
  if not redis.call('ZSCORE', KEYS[1], member .. '-1') then
    write(now, limits, now - tonumber(ago), cost, member)
    written = written + 1
  end
end
return written
