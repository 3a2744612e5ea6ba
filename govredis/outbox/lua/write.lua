-- Write the freshness lease, unless another process has written it since it was read.
--
-- KEYS[1]  the freshness lease
-- ARGV[1]  its value when it was read, or "" for nothing
-- ARGV[2]  its new value
--
-- Reply: 1 if the lease has the new value now, else 0.

local held = redis.pcall('GET', KEYS[1])
if type(held) ~= 'string' then held = '' end  -- nothing, or another type, which is written over
if held == ARGV[2] then return 1 end
if held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
