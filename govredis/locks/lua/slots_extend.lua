-- Give a holder a new lease. After queue.lua and slots.lua.
--
-- KEYS[1]  the holders
-- KEYS[4]  the waiters; under '' the last releases
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  fencing token of the caller
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
-- ARGV[5]  slots
--
-- Reply: 1 if extended, 0 if lost. The caller's lease still runs, by its own clock. If Redis has lost it (a FLUSHALL, a
-- restart or a failover to older data), the caller gets it back where there is room. A slot is not given back if the whole
-- was granted since; the whole, if anything was. Neither is given back after its release, nor where it was taken away
-- while the fence stood (a DEL, an eviction).

local owner, token = ARGV[1], tonumber(ARGV[3])
local last, whole, made = read_fence()

if not redis.call('ZSCORE', KEYS[1], owner) then
  -- This grant is not remembered, so data was lost. The grants of others may be lost too.
  if token > last then made = math.max(now_us, token + 1) end
  if token >= made then return 0 end
  if string.find(redis.call('HGET', KEYS[4], '') or '', owner .. ' ' .. ARGV[3], 1, true) then return 0 end
  if (wants_whole(owner) and last or whole) > token then return 0 end
  if not fits(owner, tonumber(ARGV[5])) then return 0 end
end
hold(owner, ARGV[2])
if wants_whole(owner) then whole = math.max(whole, token) end
write_fence(math.max(last, token), whole, made, string.format('%d', ARGV[2] + ARGV[4]))
return 1
