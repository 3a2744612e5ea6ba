-- Sliding window counters: the beginning of the scripts that use these functions.
--
-- A window is cut into BUCKETS. Each bucket counts as a whole while any moment of it lies within the window: never looser
-- than a log of all entries, and stricter by at most the width of a bucket. The text held for a window is the number of its
-- newest bucket since 1970, then that bucket's count, the count of the bucket before, and so on. At the end stand how many
-- these counts are, and their sum: without digits, so that versions before 0.4 read over it, and write the text without it.
--
-- Reply: none.

local BUCKETS = 60
-- As in log.lua.
local NO_TIME_US = 100000000000 * 1000000
-- Limits end at 10^12: another client wrote a count with more digits.
local MOST_DIGITS = 15
-- The widest window, twice, as for a log.
local LONGEST_KEPT_MS = 2 * 366 * 86400 * 1000 + 60000

-- The counter in a text, without the buckets that lie before the window. Counts stay text until they are changed: most are
-- written back as they were. `wrong`: an error where another client wrote a bucket of the year 5138, or a huge count.
local function unfold(held, window, now)
  local width = math.ceil(window / BUCKETS)
  local first = math.floor((now - window + 1) / width)
  local numbers = string.gmatch(held or '', '%d+')
  local newest = tonumber(numbers() or '0')
  local counts, used, kept, wrong = {}, 0, 0, newest * width >= NO_TIME_US
  for count in numbers do
    if wrong or newest - kept < first then break end
    kept = kept + 1
    counts[kept] = count
    used = used + count
    wrong = #count > MOST_DIGITS
  end
  wrong = wrong and redis.error_reply(string.format('COUNTER of %d microseconds: another client has changed it; ' ..
    'when that has ended, reset the identity', window))
  return {window = window, width = width, newest = newest, counts = counts, used = used, wrong = wrong}
end

-- The window in microseconds that a field of the hash stands for; nil: another client's field.
local function window_of(field)
  local window = string.find(field, '^%d+$') and #field <= MOST_DIGITS and tonumber(field)
  return window and window > 0 and window or nil
end

-- The end of a text. There is none where another client has written more buckets than a window has.
local function ending(counts, sum)
  if counts > BUCKETS + 1 then return '' end
  local digits = ''
  repeat
    digits = string.char(97 + sum % 16) .. digits
    sum = math.floor(sum / 16)
  until sum == 0
  return ' ' .. string.char(64 + counts) .. digits
end

local function fold(counter)
  local text = string.format('%d ', counter.newest) .. table.concat(counter.counts, ' ')
  return text .. ending(#counter.counts, counter.used)
end

-- As unfold, by the sum alone: `rest` is the text behind the newest count, and `counts` is nil. Returns nil where the text
-- has no sum, or where a bucket begins or ends now.
local function glance(held, window, now)
  local newest, count, rest, buckets, digits = string.match(held or '', '^(%d+) ([1-9]%d*)(.*) ([@-}])(%l+)$')
  local width = math.ceil(window / BUCKETS)
  if not newest or #count > MOST_DIGITS or #digits > 12 or tonumber(newest) ~= math.floor(now / width) then return nil end
  buckets = string.byte(buckets) - 64
  if newest - buckets + 1 < math.floor((now - window + 1) / width) then return nil end
  local sum = 0
  for i = 1, #digits do sum = sum * 16 + string.byte(digits, i) - 97 end
  return {window = window, width = width, newest = newest, count = count, rest = rest, buckets = buckets, used = sum}
end

-- Microseconds until the i-th bucket, from the newest, counts no more.
local function left(counter, i, now)
  return (counter.newest - i + 2) * counter.width - 1 + counter.window - now
end

-- Microseconds until `excess` of the present count has left the window.
local function until_free(counter, excess, now)
  for i = #counter.counts, 1, -1 do
    excess = excess - counter.counts[i]
    if excess <= 0 then return left(counter, i, now) end
  end
end

-- Microseconds until the count is 0.
local function until_empty(counter, now)
  if not counter.counts then return left(counter, 1, now) end
  for i, count in ipairs(counter.counts) do
    if count ~= '0' then return left(counter, i, now) end
  end
  return 0
end

-- The text after `cost` more now, from what `glance` found.
local function add_to_newest(counter, cost)
  local count = string.format('%d', counter.count + cost)
  return counter.newest .. ' ' .. count .. counter.rest .. ending(counter.buckets, counter.used + cost)
end

-- Count `cost` more at a time. Buckets may lie ahead of it, where leases end or the clock was set back. If it was set back by
-- more than a window, the newest bucket is taken, which is stricter. Returns whether that is the bucket's first.
local function add(counter, cost, at)
  local bucket, counts = math.floor(at / counter.width), counter.counts
  if #counts == 0 then
    counter.newest = bucket
    counts[1] = '0'
  end
  while counter.newest < bucket do
    counter.newest = counter.newest + 1
    table.insert(counts, 1, '0')
  end
  local i = counter.newest - bucket + 1
  if i > BUCKETS then i = 1 end
  while #counts < i do counts[#counts + 1] = '0' end
  local before = counts[i]
  counts[i] = string.format('%d', before + cost)
  counter.used = counter.used + cost
  return before == '0'
end

-- Take back `cost` from the bucket of that time, if it is still there and holds as much.
local function take(counter, cost, at)
  local i = counter.newest - math.floor(at / counter.width) + 1
  local count = tonumber(counter.counts[i] or '0')
  if count < cost then return false end
  counter.counts[i] = string.format('%d', count - cost)
  counter.used = counter.used - cost
  return true
end

-- Whether a call is among the latest, about 15, that a text holds: then it has arrived before. A lease that gives back
-- another one counts as two calls.
local function noted(calls, call)
  return calls and string.find(calls, ' ' .. call .. ' ', 1, true)
end

local function note(calls, call)
  return string.sub((calls or ' ') .. call .. ' ', -512)
end
