-- One sliding window log: decide and record over several limits at once, or only look.
--
-- KEYS[1]  the ZSET: member "{client microseconds}-{nonce}-{i}", score = server seconds with microseconds
-- KEYS[2]  its sibling: the longest window ever used on the key, in microseconds
-- ARGV[1]  mode: "hit" (decide, record if admitted), "peek" (decide, write nothing), "record" (record, unasked)
-- ARGV[2]  cost: whole entries
-- ARGV[3]  member: unique to the call, so that a hit which arrives twice counts once
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  limit, ARGV[6] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after}, times in
-- microseconds. A denial writes nothing. The algorithm is the sliding window log.

local log, longest_key = KEYS[1], KEYS[2]
local mode, cost, member = ARGV[1], tonumber(ARGV[2]), ARGV[3]

local now = tonumber(ARGV[4])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end

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

-- The same call, arriving again: it has been admitted already, whatever has come since.
local again = mode == 'hit' and redis.call('ZSCORE', log, member .. '-1')
local needed = cost
if again then needed = 0 end

local admitted, deciding, least, retry_after = 1, 1, nil, 0
for i = 5, #ARGV, 2 do
  local limit, window = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  local since = '(' .. seconds(now - window)
  local used = redis.call('ZCOUNT', log, since, '+inf')
  local remaining = limit - used - needed
  if remaining < 0 and mode ~= 'record' and not again then
    -- Admitted again once the entry that makes it one too many has aged out, if nobody else comes.
    local blocking = redis.call('ZRANGEBYSCORE', log, since, '+inf', 'WITHSCORES', 'LIMIT', -remaining - 1, 1)
    local wait = microseconds(blocking[2]) + window - now
    if admitted == 1 or wait > retry_after then
      admitted, deciding, least, retry_after = 0, (i - 3) / 2, limit - used, wait
    end
  elseif admitted == 1 and (not least or remaining < least) then
    deciding, least = (i - 3) / 2, remaining
  end
end

local wrote = mode ~= 'peek' and admitted == 1 and not again
if wrote then
  local longest = tonumber(redis.call('GET', longest_key)) or 0
  local widened = false
  for i = 6, #ARGV, 2 do
    if tonumber(ARGV[i]) > longest then longest, widened = tonumber(ARGV[i]), true end
  end
  redis.call('ZREMRANGEBYSCORE', log, '-inf', seconds(now - longest))
  for i = 1, cost do
    redis.call('ZADD', log, seconds(now), member .. '-' .. i)
  end
  local ttl = math.ceil(longest / 1000) + 60000
  redis.call('PEXPIRE', log, ttl)
  if widened then
    redis.call('SET', longest_key, string.format('%d', longest), 'PX', ttl)
  else
    redis.call('PEXPIRE', longest_key, ttl)
  end
end

-- The deciding limit is full again when its newest entry has aged out.
local reset_after = 0
local newest = redis.call('ZREVRANGEBYSCORE', log, '+inf', '(' .. seconds(now - tonumber(ARGV[4 + 2 * deciding])),
  'WITHSCORES', 'LIMIT', 0, 1)
if newest[2] then
  reset_after = microseconds(newest[2]) + tonumber(ARGV[4 + 2 * deciding]) - now
end

if least < 0 then least = 0 end
return {admitted, deciding, least, retry_after, reset_after}
