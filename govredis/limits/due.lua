-- Take what is due, for a while: who takes it publishes it and removes it, or it is due again then. After clock.lua.
--
-- KEYS[1]  the ZSET of what is parked for a broker; see park.lua
-- KEYS[2]  the hash of the messages
-- ARGV[1]  the while, in microseconds
-- ARGV[2]  how many at most
-- ARGV[3]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: {microseconds until the next is due, 0 if one is now, -1 if nothing is parked; entry, message, 1 if it
-- is to be published whether its time has come or not, else 0; and so on in threes}

-- Bytes of messages, after which no other is taken.
local ENOUGH = 1000000

local now = clock(ARGV[3])
local reply, bytes = {-1}, 0
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for i = 1, #due, 2 do
  if bytes > ENOUGH then break end
  local entry, odd = due[i], tonumber(due[i + 1]) % 2
  local message = redis.call('HGET', KEYS[2], entry)
  if message then
    local over = now + tonumber(ARGV[1])
    redis.call('ZADD', KEYS[1], string.format('%d', over - over % 2 + odd), entry)
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = entry, message, odd
    bytes = bytes + #message
  else
    redis.call('ZREM', KEYS[1], entry)
  end
end
local next_one = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
if next_one then reply[1] = math.max(0, tonumber(next_one) - now) end
return reply
