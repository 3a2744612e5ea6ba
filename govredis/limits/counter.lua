-- Sliding window counters: the beginning of the scripts that use these functions.
--
-- A window is cut into BUCKETS, each of which counts as a whole while any moment of it lies within the window: never
-- looser than a log of all entries, and stricter by at most the width of a bucket. What is held for a window is a text:
-- the number of its newest bucket since 1970, then that one's count, the count of the one before, and so on.
--
-- Reply: none.

local BUCKETS = 60
-- The widest window, twice, as for a log.
local LONGEST_KEPT_MS = 2 * 366 * 86400 * 1000 + 60000

-- What is held, without the buckets that lie before the window. Counts stay text until one is changed: most are written
-- back as they were.
local function unfold(held, window, now)
  local width = math.ceil(window / BUCKETS)
  local first = math.floor((now - window + 1) / width)
  local numbers = string.gmatch(held or '', '%d+')
  local newest = tonumber(numbers() or '0')
  local counts, used, kept = {}, 0, 0
  for count in numbers do
    if newest - kept < first then break end
    kept = kept + 1
    counts[kept] = count
    used = used + count
  end
  return {window = window, width = width, newest = newest, counts = counts, used = used}
end

local function fold(counter)
  return string.format('%d ', counter.newest) .. table.concat(counter.counts, ' ')
end

-- Microseconds until the i-th bucket, from the newest, counts no more.
local function left(counter, i, now)
  return (counter.newest - i + 2) * counter.width - 1 + counter.window - now
end

-- Microseconds until `excess` of what is counted now counts no more.
local function until_free(counter, excess, now)
  for i = #counter.counts, 1, -1 do
    excess = excess - counter.counts[i]
    if excess <= 0 then return left(counter, i, now) end
  end
end

-- Microseconds until nothing counts any more.
local function until_empty(counter, now)
  for i, count in ipairs(counter.counts) do
    if count ~= '0' then return left(counter, i, now) end
  end
  return 0
end

-- Count `cost` more, now; after a clock was set back, in the newest bucket, which is stricter.
local function add(counter, cost, now)
  local bucket, counts = math.floor(now / counter.width), counter.counts
  if #counts == 0 then
    counter.newest = bucket
    counts[1] = '0'
  end
  while counter.newest < bucket do
    counter.newest = counter.newest + 1
    table.insert(counts, 1, '0')
  end
  counts[1] = string.format('%d', counts[1] + cost)
end

-- Take back `cost` of what was added at a time, if its bucket is still there and has as much.
local function take(counter, cost, at)
  local i = counter.newest - math.floor(at / counter.width) + 1
  local count = tonumber(counter.counts[i] or '0')
  if count < cost then return false end
  counter.counts[i] = string.format('%d', count - cost)
  return true
end

-- The latest calls, about 15, in a text: of one among them that arrives again it is known.
local function noted(calls, call)
  return calls and string.find(calls, ' ' .. call .. ' ', 1, true)
end

local function note(calls, call)
  return string.sub((calls or ' ') .. call .. ' ', -512)
end
