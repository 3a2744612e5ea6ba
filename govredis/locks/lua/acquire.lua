-- Grant a lock, or say that it is held and queue the caller. After queue.lua and hand.lua.
--
-- KEYS[1]  lock:{resource}: the holder's owner token, with the lease as its expiry
-- KEYS[2]  its sibling "fence": the last fencing token granted
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  floor: the last fencing token that the caller's host knows
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
-- ARGV[5]  if it is held: 1: queue the caller, or note that it is still alive; 0: do not wait; 2: a confirmation: do not
--          wait, nor grant it anew if it is no longer the caller's
-- ARGV[6]  owner token of a dead holder; absent: no holder is known to be dead
-- ARGV[7]  that holder's fencing token
--
-- Reply: {1, fencing token} if granted. An owner that has it already, by a hand-over or a lost reply, gets the same token.
-- {0, milliseconds until the holder's lease ends, -1 where it has no end} if held. {0, 0} if a confirmation came too late.

local holder = redis.call('GET', KEYS[1])
local last = tonumber(redis.call('GET', KEYS[2])) or 0

if holder and holder == ARGV[6] and last == tonumber(ARGV[7]) then
  -- Release it for the dead holder. The longest waiter is next, not the caller that noticed the death.
  holder = nil
end

if not holder then
  if ARGV[5] == '2' then return {0, 0} end
  local head = first_waiter()
  if head == ARGV[1] then
    forget(head)
  elseif head then
    -- The lease ended without a release. The longest waiter is next, not the caller that happens to notice.
    hand_to(head, fence_after(last), ARGV[4])
    holder = head
  end
end

if holder and holder ~= ARGV[1] then
  if ARGV[5] == '1' then queue_up(ARGV[1]) end
  return {0, redis.call('PTTL', KEYS[1])}
end

-- The floor may be higher: the script that handed the lock over did not know the new holder's host.
local fence, floor = last, tonumber(ARGV[3])
if not holder or last <= floor then
  fence = math.max(tonumber(fence_after(last)), floor + 1)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], string.format('%d', fence), 'PX', string.format('%d', ARGV[2] + ARGV[4]))
return {1, fence}
