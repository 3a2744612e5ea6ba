-- Reads values that any client may have put there. This part comes before scripts that do so.
--
-- Reply: none of its own.

-- The string at a key; false for nothing, and for another type.
local function text(key)
  local found = redis.pcall('GET', key)
  return type(found) == 'string' and found
end

-- Two whole numbers, and a digest behind them, or "". A missing number is 0, and so is a number that no clock and no
-- sequence of ours has made.
local function two_numbers(found)
  local one, other, digest = string.match(found or '', '^(%d+) ?(%d*) ?(%x*)$')
  one, other = tonumber(one) or 0, tonumber(other) or 0
  return one < 9007199254740992 and one or 0, other < 9007199254740992 and other or 0, digest or ''
end

-- The version of the row that a value is a copy of; nil for any other value.
local function version_of(held)
  return string.match(held, '"__govredis__": {"epoch": %d+, "version": (%d+)}}$')
end

