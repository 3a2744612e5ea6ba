-- Grant a lock that nobody holds or waits for: the beginning of acquire.lua, which decides all else. It would decide the same
-- here, with more work for Redis.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- KEYS[3]  its sibling "queue"
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  floor, ARGV[4] how long the fence is kept, ARGV[5] "2" for a confirmation: as in acquire.lua
--
-- Reply: as acquire.lua's; none where others hold it or wait for it.

if ARGV[5] ~= '2' and redis.call('ZCARD', KEYS[3]) == 0 then
  local last = redis.call('GET', KEYS[2])
  if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
    local time = redis.call('TIME')
    local fence = math.max((tonumber(last) or 0) + 1, time[1] * 1000000 + time[2], ARGV[3] + 1)
    redis.call('SET', KEYS[2], string.format('%d', fence), 'PX', string.format('%d', ARGV[2] + ARGV[4]))
    return {1, fence}
  end
end
