-- Add an event to a stream: the beginning of the scripts that do so.
--
-- An entry's id is "{millisecond}-{number}". The number counts the stream's events, so a reader sees that some were trimmed.
--
-- KEYS[1]  the stream
-- KEYS[2]  its sibling "state", a hash: `number` and `ms`, of the last event's id; see relay.lua for the rest
-- ARGV[1]  how many events the stream keeps; Redis trims whole blocks, so there may be some more
-- ARGV[2]  how long the stream is kept after its last event, in milliseconds
--
-- Reply: none.

-- The millisecond and the number of the stream's last entry, also of another client's.
local function last()
  if redis.call('EXISTS', KEYS[1]) == 0 then return 0, 0 end
  local info = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      local ms, number = string.match(info[i + 1], '^(%d+)-(%d+)$')
      return tonumber(ms), tonumber(number)
    end
  end
end

-- Returns nothing, or an error. `at` is in microseconds; '' means now.
local function append(topic, id, entity, at, payload)
  local time = redis.call('TIME')
  local us = time[1] * 1000000 + time[2]
  local held = redis.call('HMGET', KEYS[2], 'ms', 'number')
  local ms, number = tonumber(held[1] or ''), tonumber(held[2] or '')
  if not (ms and number) then ms, number = last() end
  -- A clock that is set back makes no id smaller.
  ms, number = math.max(ms, math.floor(us / 1000)), number + 1
  if at == '' then at = string.format('%d', us) end
  for _ = 1, 2 do
    local added = redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], string.format('%d-%d', ms, number),
      'topic', topic, 'id', id, 'entity', entity, 'at', at, 'payload', payload)
    if not added.err then break end
    if not string.find(added.err, 'equal or smaller') then return added end
    ms = last() + 1  -- another client has added to the stream
  end
  redis.call('HSET', KEYS[2], 'ms', string.format('%d', ms), 'number', string.format('%d', number))
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[2], 2 * ARGV[2])
end
