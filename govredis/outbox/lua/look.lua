-- Redis's clock, and the freshness lease.
--
-- KEYS[1]  the freshness lease
--
-- Reply: seconds and microseconds, as TIME has them; the value at the lease's key, "" for another type than a
-- string, or false for nothing.

local time = redis.call('TIME')
local held = redis.pcall('GET', KEYS[1])
if type(held) == 'table' then held = '' end
return {time[1], time[2], held}
