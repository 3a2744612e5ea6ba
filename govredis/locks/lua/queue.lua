-- The queue of waiters: functions that begin the scripts that grant and release.
--
-- KEYS[3]  the queue: the waiters' owner tokens by arrival. With a colon and an owner token after it: the list that wakes
--          that waiter, and tells it its fencing token. It is not among the keys of a script that learns by itself who
--          is next: if its slot is on its way to another node, the waiter may not see it, and asks again soon
-- KEYS[4]  the waiters: the instant when each was last seen, in microseconds; under '' the last release: its owner token, a
--          space, its fencing token
-- KEYS[5]  the list that wakes the caller, if it may be queued. Else a token from an earlier turn might outlast the DEL on
--          the other node, if its slot is on its way
--
-- Reply: none.

local SEEN_WITHIN_US, CONFIRM_MS, KEPT_MS = 1000000, '1000', '10000'

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function fence_after(last)
  -- Above all earlier tokens, also where the fence was lost or the clock was set back (but not both).
  return string.format('%d', math.max(last + 1, now_us))
end

local function forget(owner)
  redis.call('ZREM', KEYS[3], owner)
  redis.call('HDEL', KEYS[4], owner)
end

-- The longest waiter that is alive.
local function first_waiter()
  while true do
    local owner = redis.call('ZRANGE', KEYS[3], 0, 0)[1]
    if not owner then return nil end
    local seen = tonumber(redis.call('HGET', KEYS[4], owner)) or 0
    if now_us - seen <= SEEN_WITHIN_US then return owner end
    forget(owner)
  end
end

-- At the end, or where it stood. Nothing was handed to it yet: a token that is still in its list is from an earlier turn.
local function queue_up(owner)
  redis.call('DEL', KEYS[5])
  if not redis.call('ZSCORE', KEYS[3], owner) then
    local tail = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
    redis.call('ZADD', KEYS[3], string.format('%d', math.max(now_us, tail + 1)), owner)
  end
  redis.call('HSET', KEYS[4], owner, string.format('%d', now_us))
  redis.call('PEXPIRE', KEYS[3], KEPT_MS)
  redis.call('PEXPIRE', KEYS[4], KEPT_MS)
end

-- Wake a waiter that was handed the lock. It has the lock for a moment only, until it confirms and gets a lease. Where the
-- push fails, its slot is on its way.
local function wake_up(owner, fence)
  local wake = KEYS[3] .. ':' .. owner
  forget(owner)
  redis.pcall('RPUSH', wake, fence)
  redis.pcall('PEXPIRE', wake, CONFIRM_MS)
end
