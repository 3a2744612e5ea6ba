-- The time in microseconds: the beginning of the scripts that need it. Given "", it is the server's; tests give another.
--
-- Reply: none.

local function clock(given)
  local now = tonumber(given)
  if now then return now end
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
