-- Reads values that any client may have put there. This part comes before scripts that do so.
--
-- Reply: none of its own.

-- The string at a key; false for nothing, and for another type.
local function text(key)
  local found = redis.pcall('GET', key)
  return type(found) == 'string' and found
end

-- The agent of a record; nil where it cannot be read. cjson refuses half of a surrogate pair, which JSON may have anywhere: a
-- record of ours begins with the agent.
local function agent_of(record)
  local ok, session = pcall(cjson.decode, record)
  if not ok then
    local from, to = string.match(string.gsub(record, '\\.', '__'), '^{"agent_id": ()"[^"]*()"')
    ok, session = pcall(cjson.decode, string.format('{"agent_id": %s}', from and string.sub(record, from, to) or 'null'))
  end
  local agent = ok and type(session) == 'table' and session.agent_id
  return type(agent) == 'string' and agent or nil
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

