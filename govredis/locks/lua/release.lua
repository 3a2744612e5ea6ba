-- Release a lock, if it is still the caller's, and hand it to the longest waiter; or take the caller from the queue. After
-- queue.lua and hand.lua.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- KEYS[4]  its sibling "waiters"
-- ARGV[1]  owner token of the caller
-- ARGV[2]  fencing token of the caller; 0 if it does not know: its acquire got no reply
-- ARGV[3]  how long the fence is kept, in milliseconds
--
-- Reply: 1 if released, now or by an earlier arrival of the same call; 0 if it was not, or no longer, the caller's. The
-- fence is raised above the caller's token, unless a later one stands: an extension of the caller's that is still on its
-- way finds that its lock is over, whatever was lost meanwhile.

local holder = redis.call('GET', KEYS[1])
-- With the token: a caller that its host lock refused queues up again as the same owner.
local mark = ARGV[1] .. ' ' .. ARGV[2]
if holder ~= ARGV[1] then
  forget(ARGV[1])
  if redis.call('HGET', KEYS[4], '') == mark then return 1 end
  if holder then return 0 end
end

local last, token = tonumber(redis.call('GET', KEYS[2])) or 0, tonumber(ARGV[2])
if not holder and token > 0 and last == token + 1 then return 1 end

local waiter = first_waiter()
if waiter then
  if holder then
    redis.call('HSET', KEYS[4], '', mark)
    redis.call('PEXPIRE', KEYS[4], KEPT_MS)
  end
  hand_to(waiter, fence_after(math.max(last, token)), ARGV[3])
  return holder and 1 or 0
end

if holder then
  redis.call('SET', KEYS[2], string.format('%d', math.max(last, token) + 1), 'PX', ARGV[3])
  return redis.call('DEL', KEYS[1])
end
-- A fence of one above says that the caller has released it. It has not, so two above, if nobody has held it since.
if token > 0 and token >= last then
  redis.call('SET', KEYS[2], string.format('%d', token + 2), 'PX', ARGV[3])
end
return 0
