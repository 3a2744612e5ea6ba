-- Note an outage as a process saw it, in a ZSET by its beginning. When it has ended, count it in the totals, once for all
-- processes that noticed it.
--
-- KEYS[1]  the outages
-- KEYS[2]  the totals of the account
-- ARGV[1]  the record, in JSON
-- ARGV[2]  the earlier record of the same outage, or ""
-- ARGV[3]  the server, and behind an "@" its node, if it has several
-- ARGV[4]  when it began, in microseconds
-- ARGV[5]  when it ended, or ""
-- ARGV[6]  records that began before this are dropped, in microseconds
-- ARGV[7]  how many records are kept
--
-- Reply: 1. A call that arrives twice adds nothing the second time.

-- As in outage_log.py.
local RELAPSE = 1000000
local outages, totals = KEYS[1], KEYS[2]

if ARGV[2] ~= '' and ARGV[2] ~= ARGV[1] then redis.call('ZREM', outages, ARGV[2]) end
local is_new = redis.call('ZADD', outages, ARGV[4], ARGV[1]) == 1
if is_new and ARGV[5] ~= '' then
  local latest = tonumber(ARGV[5]) + RELAPSE
  local others = redis.call('ZREVRANGEBYSCORE', outages, string.format('%d', latest), '-inf', 'LIMIT', '0', '100')
  local counted = false
  for _, text in ipairs(others) do
    local readable, other = pcall(cjson.decode, text)
    if text ~= ARGV[1] and readable and type(other) == 'table' and other.server == ARGV[3]
        and type(other.ended) == 'number' and other.ended + RELAPSE >= tonumber(ARGV[4]) then
      counted = true
    end
  end
  if not counted then redis.call('HINCRBY', totals, 'outages.' .. string.match(ARGV[3], '^[^@]+'), 1) end
end
redis.call('ZREMRANGEBYSCORE', outages, '-inf', ARGV[6])
redis.call('ZREMRANGEBYRANK', outages, 0, -1 - tonumber(ARGV[7]))
return 1
