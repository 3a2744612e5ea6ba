-- Several limits that are counters, together: the scripts that decide over them use these functions. After counter.lua.
--
-- KEYS[1]  a HASH: a counter for each window, in microseconds; the latest calls, under "calls"; and the member of the first
--          lease, under "origin": see counter_lease.lua
--
-- Reply: none.

-- Are `needed` more within every limit? `limits` has each limit and its window in turn; `held` has "calls", "origin" and
-- the text of each window. `unasked`: admitted whatever the answer is. `glanced`: the sums may do, without the buckets.
-- Returns the counters, whether they are, the index of the deciding limit, its remaining, and how long to wait. Or nil and
-- an error, COUNTER, where another client has written an impossible counter.
local function decide(limits, held, needed, unasked, glanced, now)
  local counters, admitted, deciding, least, wait = {}, true, 1, nil, 0
  for i = 1, #limits / 2 do
    local limit, window, text = tonumber(limits[2 * i - 1]), tonumber(limits[2 * i]), held[i + 2]
    local counter = glanced and glance(text, window, now)
    if not counter or (counter.used + needed > limit and not unasked) then counter = unfold(text, window, now) end
    if counter.wrong then return nil, counter.wrong end
    counters[i] = counter
    local remaining = limit - counter.used - needed
    if remaining < 0 and not unasked then
      local freed = until_free(counter, -remaining, now)
      if admitted or freed > wait then admitted, deciding, least, wait = false, i, limit - counter.used, freed end
    elseif admitted and (not least or remaining < least) then
      deciding, least = i, remaining
    end
  end
  return counters, admitted, deciding, least, wait
end

-- Count `cost` in each of the counters, of these windows, at a time, and write them with the other fields in `written`.
-- `known`: how many fields these are in all, and those of other windows go when they have ended.
local function count(counters, windows, cost, at, now, written, known)
  local begun = false
  for i, counter in ipairs(counters) do
    written[#written + 1] = windows[i]
    if counter.counts then
      if add(counter, cost, at) then begun = true end
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
  if redis.call('HLEN', KEYS[1]) > known then
    for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
      local window = window_of(field)
      local ended = not window or unfold(redis.call('HGET', KEYS[1], field), window, now).used == 0
      if ended and field ~= 'calls' and field ~= 'origin' then redis.call('HDEL', KEYS[1], field) end
    end
  end
end

-- The windows of the limits.
local function windows_of(limits)
  local windows = {}
  for i = 2, #limits, 2 do windows[i / 2] = limits[i] end
  return windows
end

-- Take back `cost` of a time from counters, once by the same name. `held` is a reply to HMGET of "calls", "origin" and these
-- windows, and is changed with what is written. Returns whether it was taken back, then or now.
local function take_back(held, windows, cost, at, name, now)
  if noted(held[1], name) then return true end
  local written = {}
  for i, window in ipairs(windows) do
    local counter = unfold(held[i + 2], tonumber(window), now)
    if not counter.wrong and take(counter, cost, at) then
      held[i + 2] = fold(counter)
      written[#written + 1] = window
      written[#written + 1] = held[i + 2]
    end
  end
  if #written == 0 then return false end
  held[1] = note(held[1], name)
  redis.call('HSET', KEYS[1], 'calls', held[1], unpack(written))
  return true
end
