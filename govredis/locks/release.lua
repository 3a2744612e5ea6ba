-- Release a lock, if it is still the caller's, to the waiter that has waited longest; or leave the queue. After queue.lua
-- and hand.lua.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- KEYS[4]  its sibling "waiters"
-- ARGV[1]  owner token of the caller
-- ARGV[2]  fencing token of the caller; 0 if it does not know, its acquire having got no reply
-- ARGV[3]  how long the fence is kept, in milliseconds
--
-- Reply: 1 if released, now or by the same call arriving before, 0 if it was not the caller's (any more). Unless it is
-- somebody else's, the fence is raised, so that an extension of this holder's that is still on its way finds that its
-- lock is over, whatever was lost meanwhile.

local holder = redis.call('GET', KEYS[1])
-- With the token: one that this host's guard refused queues up again as the same owner.
local mark = ARGV[1] .. ' ' .. ARGV[2]
if holder ~= ARGV[1] then
  forget(ARGV[1])
  if redis.call('HGET', KEYS[4], '') == mark then return 1 end
  if holder then return 0 end
end

local last, token = tonumber(redis.call('GET', KEYS[2])) or 0, tonumber(ARGV[2])
if not holder and token > 0 and last == token + 1 then return 1 end
last = math.max(last, token)

local waiter = first_waiter()
if waiter then
  hand_to(waiter, fence_after(last), ARGV[3])
  if holder then
    redis.call('HSET', KEYS[4], '', mark)
    redis.call('PEXPIRE', KEYS[4], KEPT_MS)
  end
  return holder and 1 or 0
end

if last > 0 then redis.call('SET', KEYS[2], string.format('%d', last + 1), 'PX', ARGV[3]) end
return redis.call('DEL', KEYS[1])
