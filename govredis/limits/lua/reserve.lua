-- Admit, or reserve the first time at which there is room if nobody else comes. The reserved entries stand in the log from
-- now on, so that everybody else stays within the limits. Called again at that time. After clock.lua and log.lua.
--
-- KEYS[1]  the log, and its sibling "window" after it: see log.lua
-- KEYS[3]  its sibling "booked": a ZSET of the reserved entries, with the scores that they have in the log
-- KEYS[4]  its sibling "moved": the same, of reservations that were called for at their time, and had to be moved
-- ARGV[1]  mode: "hit"; or "reserve": room that there is now is reserved too, for now, and a later "hit" is admitted
-- ARGV[2]  cost: whole entries
-- ARGV[3]  member: unique to the call
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  reservation: its name, the same at every call for the same thing
-- ARGV[6]  patience: a reservation that finds no room at its time, but will in so many microseconds, keeps its place. Its
--          caller calls again then
-- ARGV[7]  limit, ARGV[8] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, the time reserved
-- or 0}, times in microseconds. An error, SCORE, for a log with scores that are no times.
--
-- Each call decides a reservation anew, by the admitted entries and by the reservations for an earlier time: those for later
-- wait for it. So a caller that comes late still has its turn, and never breaks the limits. It may find no room then,
-- because others were late. If the wait is short, it keeps its place. Else it is moved behind all that were moved before it,
-- and comes before all that nobody has called for yet. A caller that comes early finds its time unchanged, or an earlier
-- time where room was made. Reservations that are never called for count at their time, as if admitted.

local DAY = 86400 * 1000000

local mode, cost, member, reservation, patience = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[5], tonumber(ARGV[6])
local now, limits = clock(ARGV[4]), {unpack(ARGV, 7)}

local last = last_score()
local last_reserved = redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')
local last_moved = redis.call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES')
local wrong = no_time(last) or no_time(last_reserved[2]) or no_time(last_moved[2])
if wrong then return wrong end

if redis.call('ZSCORE', KEYS[1], member .. '-1') then
  -- The same call, arriving again: it has been admitted already.
  local _, deciding, least = look(now, limits, 0, nil, true)
  return {1, deciding, least, 0, reset_after(now, tonumber(limits[2 * deciding]), microseconds(last)), 0}
end

-- Another client, or an eviction, may remove the log and leave its siblings. So entries there must also be in the log.
local function gone(newest)
  return newest[1] and microseconds(newest[2]) > now - longest_used() and not redis.call('ZSCORE', KEYS[1], newest[1])
end
if gone(last_reserved) or gone(last_moved) then
  redis.call('DEL', KEYS[3], KEYS[4])
end

local was_moved = redis.call('ZSCORE', KEYS[4], reservation .. '-1')
local reserved = was_moved or redis.call('ZSCORE', KEYS[3], reservation .. '-1')
local spared = nil
-- An entry in the log alone: its booking was lost.
if reserved or redis.call('ZSCORE', KEYS[1], reservation .. '-1') then
  local i = 1
  while redis.call('ZREM', KEYS[3], reservation .. '-' .. i) + redis.call('ZREM', KEYS[4], reservation .. '-' .. i) +
    redis.call('ZREM', KEYS[1], reservation .. '-' .. i) > 0 do
    i = i + 1
  end
  last = last_score()
end
if reserved then
  spared = function(score, bound)
    local later = score > tonumber(reserved) and bound or '(' .. reserved
    if not was_moved then return redis.call('ZCOUNT', KEYS[3], later, '+inf') end
    return redis.call('ZCOUNT', KEYS[3], bound, '+inf') + redis.call('ZCOUNT', KEYS[4], later, '+inf')
  end
end

local admitted, deciding, least, wait, longest, old = look(now, limits, cost, spared, false)
if admitted and mode == 'hit' then
  local _, newest = write(now, longest, old, now, cost, member, last)
  return {1, deciding, least, 0, reset_after(now, tonumber(limits[2 * deciding]), newest), 0}
end

local at, moved = now + wait, was_moved
if reserved and microseconds(reserved) <= now and not admitted then
  if wait <= patience then at = microseconds(reserved) else moved = true end
end
local _, newest, kept_ms = write(now, longest, old, at, cost, reservation, last)
local over = seconds(now - longest_used() - DAY)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', over)
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', over)
for i = 1, cost do
  if moved then
    redis.call('ZADD', KEYS[4], seconds(at), reservation .. '-' .. i)
  else
    redis.call('ZADD', KEYS[3], seconds(at), reservation .. '-' .. i)
  end
end
kept_ms = string.format('%d', kept_ms + DAY / 1000)
redis.call('PEXPIRE', KEYS[3], kept_ms)
redis.call('PEXPIRE', KEYS[4], kept_ms)
return {admitted and 1 or 0, deciding, least, wait, reset_after(now, tonumber(limits[2 * deciding]), newest), at}
