-- Grant a lock, or say that it is held, and queue up for it. After queue.lua and hand.lua.
--
-- KEYS[1]  lock:{resource}: the holder's owner token, with the lease as its expiry
-- KEYS[2]  its sibling "fence": the last fencing token granted
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  floor: the last fencing token that the caller's host knows of
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
-- ARGV[5]  1: queue up if it is held, or stay in the queue and be seen alive; 0: do not wait for it; 2: nor take it anew,
--          if it was the caller's and is not any more
-- ARGV[6]  an owner that is certainly gone, whom the caller succeeds; absent: none
--
-- Reply: {1, fencing token} if granted (also if it was granted to this owner before: it was handed over, or the reply was
-- lost; then the same token), {0, milliseconds until the holder's lease ends, -1 where it has no end} if held, {0, 0} if
-- not taken anew.

local holder = redis.call('GET', KEYS[1])
local last = tonumber(redis.call('GET', KEYS[2])) or 0

if not holder then
  if ARGV[5] == '2' then return {0, 0} end
  local head = first_waiter()
  if head == ARGV[1] then
    forget(head)
  elseif head then
    -- It ended without a release. Whoever came first is next, not whoever happens to notice.
    hand_to(head, fence_after(last), ARGV[4])
    holder = head
  end
end

if holder and holder == ARGV[6] then
  -- Before those that wait: it is the same run's.
  holder = nil
elseif holder and holder ~= ARGV[1] then
  if ARGV[5] == '1' then queue_up(ARGV[1]) end
  return {0, redis.call('PTTL', KEYS[1])}
end

-- A floor that is not below it: who handed the lock over did not know of the new holder's host.
local fence, floor = last, tonumber(ARGV[3])
if not holder or last <= floor then
  fence = math.max(tonumber(fence_after(last)), floor + 1)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], string.format('%d', fence), 'PX', string.format('%d', ARGV[2] + ARGV[4]))
return {1, fence}
