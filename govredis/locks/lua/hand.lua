-- Handing over an exclusive lock: a function that comes after queue.lua.
--
-- KEYS[1]  lock:{resource}: the holder's owner token, with the lease as its expiry
-- KEYS[2]  its sibling "fence": the last fencing token granted
--
-- Reply: none.

local function hand_to(owner, fence, fence_kept_ms)
  redis.call('SET', KEYS[1], owner, 'PX', CONFIRM_MS)
  redis.call('SET', KEYS[2], fence, 'PX', string.format('%d', CONFIRM_MS + fence_kept_ms))
  wake_up(owner, fence)
end
