-- Decide and count over several limits at once, or only look: window.lua, for counters. After clock.lua and counter.lua.
--
-- KEYS[1]  a HASH: a counter for each window, in microseconds; and the latest calls, under "calls"
-- ARGV[1]  mode: "hit" (decide, count if admitted), "peek" (decide, write nothing), "record" (count, unasked)
-- ARGV[2]  cost
-- ARGV[3]  member: unique to the call. A call that arrives again while it is among the latest, about 15, counts once
-- ARGV[4]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[5]  limit, ARGV[6] its window in microseconds, and so on in pairs
--
-- Reply: {admitted (1 or 0), index of the deciding limit from 1, its remaining, retry_after, reset_after, now}, times in
-- microseconds. A denial writes nothing. An error, COUNTER, where another client has written an impossible counter.

local mode, cost, member = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now, limits = clock(ARGV[4]), {unpack(ARGV, 5)}

local fields = {'calls'}
for i = 2, #limits, 2 do fields[#fields + 1] = limits[i] end
local held = redis.call('HMGET', KEYS[1], unpack(fields))
local calls = held[1]

local again = mode == 'hit' and noted(calls, member)
local needed, unasked = again and 0 or cost, again or mode == 'record'
local counters, admitted, deciding, least, wait = {}, true, 1, nil, 0
for i = 1, #limits / 2 do
  local limit, window = tonumber(limits[2 * i - 1]), tonumber(limits[2 * i])
  local counter = glance(held[i + 1], window, now)
  if not counter or (counter.used + needed > limit and not unasked) then counter = unfold(held[i + 1], window, now) end
  if counter.wrong then return counter.wrong end
  counters[i] = counter
  local remaining = limit - counter.used - needed
  if remaining < 0 and not unasked then
    local freed = until_free(counter, -remaining, now)
    if admitted or freed > wait then admitted, deciding, least, wait = false, i, limit - counter.used, freed end
  elseif admitted and (not least or remaining < least) then
    deciding, least = i, remaining
  end
end

if admitted and mode ~= 'peek' and not again then
  local written, begun = {'calls', note(calls, member)}, false
  for _, counter in ipairs(counters) do
    written[#written + 1] = string.format('%d', counter.window)
    if counter.counts then
      if add(counter, cost, now) then begun = true end
      written[#written + 1] = fold(counter)
    else
      written[#written + 1] = add_to_newest(counter, cost)
    end
  end
  -- All of a bucket counts equally long, so what follows its first is kept long enough.
  local before = begun and redis.call('PTTL', KEYS[1])
  redis.call('HSET', KEYS[1], unpack(written))
  if begun then
    local kept = 0
    for _, counter in ipairs(counters) do
      kept = math.max(kept, math.ceil(until_empty(counter, now) / 1000) + 60000)
    end
    kept = math.min(kept, LONGEST_KEPT_MS)
    -- No TTL is shortened, though nobody else has a reason to set one here.
    if before ~= -1 and kept > before then redis.call('PEXPIRE', KEYS[1], string.format('%d', kept)) end
  end
  if redis.call('HLEN', KEYS[1]) > #fields then
    for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
      local window = window_of(field)
      if field ~= 'calls' and not (window and unfold(redis.call('HGET', KEYS[1], field), window, now).used > 0) then
        redis.call('HDEL', KEYS[1], field)
      end
    end
  end
end

local reset_after = until_empty(counters[deciding], now)
return {admitted and 1 or 0, deciding, math.max(0, least), wait, reset_after, now}
