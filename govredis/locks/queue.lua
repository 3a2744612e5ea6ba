-- Who is next: the beginning of the scripts that grant and release, which use these functions.
--
-- KEYS[3]  the queue: the waiters' owner tokens by arrival; followed by a colon and one of them, the list by which that
--          waiter is woken, and told its fencing token
-- KEYS[4]  the waiters: when each of them was last seen, in microseconds; under '' who released last, a space, and with
--          which token
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

-- At the end, or where it was. Until now nobody has handed it anything: what is still in its list was of an earlier turn.
local function queue_up(owner)
  local wake = KEYS[3] .. ':' .. owner
  redis.call('DEL', wake)
  if not redis.call('ZSCORE', KEYS[3], owner) then
    local tail = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
    redis.call('ZADD', KEYS[3], string.format('%d', math.max(now_us, tail + 1)), owner)
  end
  redis.call('HSET', KEYS[4], owner, string.format('%d', now_us))
  redis.call('PEXPIRE', KEYS[3], KEPT_MS)
  redis.call('PEXPIRE', KEYS[4], KEPT_MS)
end

-- Wake one that was handed the lock. It has it for a moment only: it makes it a lease when it wakes up.
local function wake_up(owner, fence)
  local wake = KEYS[3] .. ':' .. owner
  forget(owner)
  redis.call('RPUSH', wake, fence)
  redis.call('PEXPIRE', wake, CONFIRM_MS)
end
