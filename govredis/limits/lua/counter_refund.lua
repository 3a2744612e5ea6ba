-- Give back what a hit added to counters, where its buckets are still there. After clock.lua and counter.lua.
--
-- KEYS[1]  the HASH of counter_window.lua
-- ARGV[1]  cost
-- ARGV[2]  member of the hit. A refund that arrives again while it is among the latest calls gives nothing back again
-- ARGV[3]  when it was admitted, in microseconds
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  a window in microseconds, and so on
--
-- Reply: 1 if something was given back, else 0.

local cost, call, at, now = tonumber(ARGV[1]), '-' .. ARGV[2], tonumber(ARGV[3]), clock(ARGV[4])

local calls = redis.call('HGET', KEYS[1], 'calls')
if noted(calls, call) then return 1 end

local given = 0
for i = 5, #ARGV do
  local counter = unfold(redis.call('HGET', KEYS[1], ARGV[i]), tonumber(ARGV[i]), now)
  if not counter.wrong and take(counter, cost, at) then
    redis.call('HSET', KEYS[1], ARGV[i], fold(counter))
    given = 1
  end
end
if given == 1 then redis.call('HSET', KEYS[1], 'calls', note(calls, call)) end
return given
