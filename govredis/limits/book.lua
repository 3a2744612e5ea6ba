-- Admit, or book the first time at which there is room, if nobody else comes: its entries stand in the log from now on, so
-- that everybody else stays within the limits. Called again when that time has come. After log.lua.
--
-- KEYS[1]  the log
-- KEYS[2]  its sibling "window"
-- KEYS[3]  its sibling "booked": a ZSET of the entries that are booked, with the scores they have in the log
-- ARGV[1]  cost: whole entries
-- ARGV[2]  member: unique to the call
-- ARGV[3]  booking: the same at every call for the same thing
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  limit, ARGV[6] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, the time booked
-- or 0}, times in microseconds. One whose time has come is decided by what was admitted: later bookings do not count, for
-- they wait for it. It keeps its place: one that came too early, or comes late and finds no room, is moved, not put last.

local cost, member, booking = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local now, limits = clock(ARGV[4]), {unpack(ARGV, 5)}

if redis.call('ZSCORE', KEYS[1], member .. '-1') then
  -- The same call, arriving again: it has been admitted already.
  local found = look(now, limits, 0, 0, true)
  return {1, found.deciding, found.least, 0, reset_after(now, limits, found.deciding), 0}
end

local booked = tonumber(redis.call('ZSCORE', KEYS[3], booking .. '-1') or '')
if booked and booked > tonumber(seconds(now)) then
  local left = microseconds(booked) - now
  return {0, 1, 0, left, reset_after(now, limits, 1), now + left}
end

local spared = 0
if booked then
  for i = 1, cost do
    redis.call('ZREM', KEYS[1], booking .. '-' .. i)
    redis.call('ZREM', KEYS[3], booking .. '-' .. i)
  end
  spared = redis.call('ZCOUNT', KEYS[3], '(' .. seconds(now), '+inf')
end

local found = look(now, limits, cost, spared, false)
if found.admitted then
  write(now, limits, now, cost, member)
  return {1, found.deciding, found.least, 0, reset_after(now, limits, found.deciding), 0}
end

local at = now + found.wait
write(now, limits, at, cost, booking)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', seconds(now - tonumber(redis.call('GET', KEYS[2]))))
for i = 1, cost do
  redis.call('ZADD', KEYS[3], seconds(at), booking .. '-' .. i)
end
redis.call('PEXPIRE', KEYS[3], redis.call('PTTL', KEYS[1]))
return {0, found.deciding, found.least, found.wait, reset_after(now, limits, found.deciding), at}
