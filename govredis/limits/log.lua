-- A sliding window log: the beginning of the scripts that decide over one or change it, which use these functions.
--
-- KEYS[1]  the ZSET: members end in "-{i}", scores are server seconds with microseconds. One whose score lies in the
--          future was booked, or is another client's: it counts like any other
-- KEYS[2]  its sibling: the longest window ever used on the key, in microseconds
--
-- Reply: none.

-- The widest window, twice: one that starts at the end of another.
local LONGEST_KEPT_MS = 2 * 366 * 86400 * 1000 + 60000

-- Microseconds as decimal seconds. Both sides of every comparison go through here, so rounding to a double cannot
-- reorder them.
local function seconds(us)
  return string.format('%d.%06d', math.floor(us / 1000000), us % 1000000)
end

-- The first microsecond that is not before a score: other clients' scores may lie between two.
local function microseconds(score)
  score = tonumber(score)
  local us = math.floor(score * 1000000 + 0.5)
  if tonumber(seconds(us)) < score then us = us + 1 end
  return us
end

-- The score of the `nth` entry from the end, of those that are not spared: see look. Never asked for one too many.
local function nth_from_the_end(nth, spared)
  local function at(rank)
    rank = string.format('%d', rank)
    return redis.call('ZRANGE', KEYS[1], rank, rank, 'WITHSCORES')[2]
  end
  if not spared then return at(-nth) end
  local low, high = 0, redis.call('ZCARD', KEYS[1]) - nth
  while low < high do
    local middle = math.ceil((low + high) / 2)
    local score = at(middle)
    if redis.call('ZCOUNT', KEYS[1], score, '+inf') - spared(tonumber(score), score) >= nth then
      low = middle
    else
      high = middle - 1
    end
  end
  return at(low)
end

-- Are `needed` more within every limit? `limits` has each limit and its window in turn. `spared(score, bound)` says how
-- many entries from a score on are not to count (`bound` is that as ZCOUNT takes it), if any. `unasked`: admitted whatever
-- the answer is.
local function look(now, limits, needed, spared, unasked)
  local found = {admitted = true, deciding = 1, wait = 0}
  for i = 1, #limits, 2 do
    local limit, window = tonumber(limits[i]), tonumber(limits[i + 1])
    local since = seconds(now - window)
    local used = redis.call('ZCOUNT', KEYS[1], '(' .. since, '+inf')
    if spared then used = math.max(0, used - spared(tonumber(since), '(' .. since)) end
    local remaining = limit - used - needed
    if remaining < 0 and not unasked then
      -- Admitted again once the entry that makes it one too many has aged out, if nobody else comes.
      local wait = microseconds(nth_from_the_end(limit - needed + 1, spared)) + window - now
      if found.admitted or wait > found.wait then
        found = {admitted = false, deciding = (i + 1) / 2, least = limit - used, wait = wait}
      end
    elseif found.admitted and (not found.least or remaining < found.least) then
      found.deciding, found.least = (i + 1) / 2, remaining
    end
  end
  found.least = math.max(0, found.least)
  return found
end

-- Write `cost` entries at a time, and keep all for as long as they may count.
local function write(now, limits, at, cost, member)
  local longest = tonumber(redis.call('GET', KEYS[2])) or 0
  local widened = false
  for i = 2, #limits, 2 do
    if tonumber(limits[i]) > longest then longest, widened = tonumber(limits[i]), true end
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', seconds(now - longest))
  for i = 1, cost do
    redis.call('ZADD', KEYS[1], seconds(at), member .. '-' .. i)
  end
  local newest = tonumber(redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]) * 1000000
  local kept_ms = math.ceil((math.max(0, newest - now) + longest) / 1000) + 60000
  kept_ms = string.format('%d', math.min(kept_ms, LONGEST_KEPT_MS))
  redis.call('PEXPIRE', KEYS[1], kept_ms)
  if widened then
    redis.call('SET', KEYS[2], string.format('%d', longest), 'PX', kept_ms)
  else
    redis.call('PEXPIRE', KEYS[2], kept_ms)
  end
end

-- When the deciding limit is full again: its newest entry has aged out.
local function reset_after(now, limits, deciding)
  local window = tonumber(limits[2 * deciding])
  local newest = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
  return newest and math.max(0, microseconds(newest) + window - now) or 0
end
