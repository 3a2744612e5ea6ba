-- Give back what a hit or a lease added to counters, where its buckets are still there. After
-- clock.lua, counter.lua and counter_limits.lua.
--
-- KEYS[1]  the HASH of counter_limits.lua
-- ARGV[1]  cost
-- ARGV[2]  member of the hit, or of this refund of a lease. One that arrives again while it is among the latest calls gives nothing back again
-- ARGV[3]  when it was admitted, in microseconds
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  the lease's origin, or "-" for a hit; see counter_lease.lua
-- ARGV[6]  a window in microseconds, and so on
--
-- Reply: 1 if something was given back, else 0.

local windows = {unpack(ARGV, 6)}
local held = redis.call('HMGET', KEYS[1], 'calls', 'origin', unpack(windows))
if ARGV[5] ~= '-' and ARGV[5] ~= held[2] then return 0 end
return take_back(held, windows, tonumber(ARGV[1]), tonumber(ARGV[3]), '-' .. ARGV[2], clock(ARGV[4])) and 1 or 0
