-- Who is next: the beginning of acquire.lua and release.lua, which use these functions.
--
-- KEYS[1]  lock:{resource}: the holder's owner token, with the lease as its expiry
-- KEYS[2]  its sibling "fence": the last fencing token granted
-- KEYS[3]  its sibling "queue": the waiters' owner tokens by arrival; followed by a colon and one of them, the list by
--          which that waiter is woken
-- KEYS[4]  its sibling "waiters": when each waiter was last seen, in microseconds; under '' who handed the lock over last,
--          a space, and with which token
--
-- Reply: none.

local SEEN_WITHIN_US, CONFIRM_MS, KEPT_MS = 1000000, '1000', '10000'

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function fence_after(last)
  -- Above all earlier ones, also where the fence was lost or the clock was set back (but not both).
  return string.format('%d', math.max(last + 1, now_us))
end

local function forget(owner)
  redis.call('ZREM', KEYS[3], owner)
  redis.call('HDEL', KEYS[4], owner)
end

-- The waiter that has waited longest, of those that are alive.
local function first_waiter()
  while true do
    local owner = redis.call('ZRANGE', KEYS[3], 0, 0)[1]
    if not owner then return nil end
    local seen = tonumber(redis.call('HGET', KEYS[4], owner)) or 0
    if now_us - seen <= SEEN_WITHIN_US then return owner end
    forget(owner)
  end
end

-- For a moment only: the waiter makes it a lease when it wakes up, and if it does not, the next one is granted the lock.
local function hand_to(owner, fence, fence_kept_ms)
  local wake = KEYS[3] .. ':' .. owner
  forget(owner)
  redis.call('SET', KEYS[1], owner, 'PX', CONFIRM_MS)
  redis.call('SET', KEYS[2], fence, 'PX', fence_kept_ms)
  redis.call('RPUSH', wake, '1')
  redis.call('PEXPIRE', wake, CONFIRM_MS)
end
