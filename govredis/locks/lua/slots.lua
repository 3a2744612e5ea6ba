-- Slots: functions of semaphores and read/write locks, which several may hold. They come after queue.lua. A semaphore has so
-- many slots. A read/write lock has more slots than there can be readers; a writer takes it whole.
--
-- KEYS[1]  the holders' owner tokens by the end of their leases, in microseconds of the server's clock; those that begin
--          with "w" hold it whole
-- KEYS[2]  the fence: the last fencing token granted, the last that was granted for the whole, and when this key was made,
--          in microseconds: a lower token was granted before data was lost
--
-- Reply: none.

redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now_us))

local function wants_whole(owner)
  return string.sub(owner, 1, 1) == 'w'
end

local function read_fence()
  local last, whole, made = string.match(redis.call('GET', KEYS[2]) or '', '^(%d+) (%d+) (%d+)$')
  return tonumber(last) or 0, tonumber(whole) or 0, tonumber(made) or now_us
end

local function write_fence(last, whole, made, kept_ms)
  redis.call('SET', KEYS[2], string.format('%d %d %d', last, whole, made), 'PX', kept_ms)
end

local function fits(owner, slots)
  local taken = redis.call('ZCARD', KEYS[1])
  if taken == 0 then return true end
  if wants_whole(owner) or wants_whole(redis.call('ZRANGE', KEYS[1], 0, 0)[1]) then return false end
  return taken < slots
end

local function hold(owner, ttl_ms)
  redis.call('ZADD', KEYS[1], string.format('%d', now_us + ttl_ms * 1000), owner)
  if redis.call('PTTL', KEYS[1]) < tonumber(ttl_ms) then redis.call('PEXPIRE', KEYS[1], ttl_ms) end
end

-- Hand it over to the longest waiters, while there is room. Returns the last tokens granted.
local function hand_over(last, whole, slots)
  while true do
    local owner = first_waiter()
    if not owner or not fits(owner, slots) then return last, whole end
    local fence = fence_after(last)
    last = tonumber(fence)
    if wants_whole(owner) then whole = last end
    hold(owner, CONFIRM_MS)
    wake_up(owner, fence)
  end
end
