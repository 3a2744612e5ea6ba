-- Admit, or book the first time at which there is room, if nobody else comes: its entries stand in the log from now on, so
-- that everybody else stays within the limits. Called again when that time has come. After clock.lua and log.lua.
--
-- KEYS[1]  the log
-- KEYS[2]  its sibling "window"
-- KEYS[3]  its sibling "booked": a ZSET of the entries that are booked, with the scores they have in the log
-- KEYS[4]  its sibling "moved": as "booked", those that called when their time had come, and had to be moved
-- ARGV[1]  mode: "hit", or "book": what there is room for now is booked for now, to be admitted by a "hit"
-- ARGV[2]  cost: whole entries
-- ARGV[3]  member: unique to the call
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  booking: the same at every call for the same thing
-- ARGV[6]  patience: what was booked and finds no room, but will in so many microseconds, keeps its place: it is called
--          for again then
-- ARGV[7]  limit, ARGV[8] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, the time booked
-- or 0}, times in microseconds.
--
-- What was booked is decided anew at each call, by what was admitted and by what is booked for an earlier time: what is
-- booked for later waits for it. So one that comes late has its turn still, and never breaks the limits. One for which
-- there is no room then, because others were late, waits in its place if that is short; else it is moved behind all that
-- were moved before it, and comes before all that nobody has called for yet. One that comes early finds its time as it
-- was, or an earlier one where room was made. Entries that are never called for count at their time, as if admitted.

local DAY = 86400 * 1000000

local mode, cost, member, booking, patience = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[5], tonumber(ARGV[6])
local now, limits = clock(ARGV[4]), {unpack(ARGV, 7)}

if redis.call('ZSCORE', KEYS[1], member .. '-1') then
  -- The same call, arriving again: it has been admitted already.
  local found = look(now, limits, 0, nil, true)
  return {1, found.deciding, found.least, 0, reset_after(now, limits, found.deciding), 0}
end

-- Who removes the log (another client, an eviction) does not know of its siblings: what stands there must be in the log.
local function gone(newest)
  local longest = tonumber(redis.call('GET', KEYS[2])) or 0
  return newest[1] and microseconds(newest[2]) > now - longest and not redis.call('ZSCORE', KEYS[1], newest[1])
end
if gone(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')) or gone(redis.call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES')) then
  redis.call('DEL', KEYS[3], KEYS[4])
end

local was_moved = redis.call('ZSCORE', KEYS[4], booking .. '-1')
local booked = was_moved or redis.call('ZSCORE', KEYS[3], booking .. '-1')
local spared = nil
if booked then
  local i = 1
  while redis.call('ZREM', KEYS[3], booking .. '-' .. i) + redis.call('ZREM', KEYS[4], booking .. '-' .. i) > 0 do
    redis.call('ZREM', KEYS[1], booking .. '-' .. i)
    i = i + 1
  end
  spared = function(score, bound)
    local later = score > tonumber(booked) and bound or '(' .. booked
    if not was_moved then return redis.call('ZCOUNT', KEYS[3], later, '+inf') end
    return redis.call('ZCOUNT', KEYS[3], bound, '+inf') + redis.call('ZCOUNT', KEYS[4], later, '+inf')
  end
end

local found = look(now, limits, cost, spared, false)
if found.admitted and mode == 'hit' then
  write(now, limits, now, cost, member)
  return {1, found.deciding, found.least, 0, reset_after(now, limits, found.deciding), 0}
end

local at, moved = now + found.wait, was_moved
if booked and microseconds(booked) <= now and not found.admitted then
  if found.wait <= patience then at = microseconds(booked) else moved = true end
end
write(now, limits, at, cost, booking)
local over = seconds(now - tonumber(redis.call('GET', KEYS[2])) - DAY)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', over)
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', over)
for i = 1, cost do
  if moved then
    redis.call('ZADD', KEYS[4], seconds(at), booking .. '-' .. i)
  else
    redis.call('ZADD', KEYS[3], seconds(at), booking .. '-' .. i)
  end
end
local kept_ms = redis.call('PTTL', KEYS[1]) + DAY / 1000
redis.call('PEXPIRE', KEYS[3], kept_ms)
redis.call('PEXPIRE', KEYS[4], kept_ms)
local admitted = found.admitted and 1 or 0
return {admitted, found.deciding, found.least, found.wait, reset_after(now, limits, found.deciding), at}
