-- Take entries that are due. The taker publishes and removes them; after a while they are due again. After clock.lua.
--
-- KEYS[1]  the ZSET of the entries parked for a broker; see park.lua
-- KEYS[2]  the hash of the messages
-- KEYS[3]  the hash of the entries that are set aside; see set_aside.lua
-- ARGV[1]  the while, in microseconds
-- ARGV[2]  how many at most
-- ARGV[3]  now in microseconds, or "" for the server's clock (tests only pass one)
--
-- Reply: {microseconds until the next is due, then threes of entry, message and flag}. The first is 0 if the next is due
-- now, and -1 if nothing is parked. The flag is 1 if the message is published whether it is due or not, else 0.

-- Bytes of messages after which no more are taken.
local ENOUGH = 1000000
-- Microseconds. Another client's score may be infinite.
local LONGEST = 1000000000000000

local now = clock(ARGV[3])
local reply, bytes = {-1}, 0
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for i = 1, #due, 2 do
  if bytes > ENOUGH then break end
  local entry, odd = due[i], tonumber(due[i + 1]) % 2 == 1 and 1 or 0
  local message = redis.call('HGET', KEYS[2], entry)
  if message then
    local over = now + tonumber(ARGV[1])
    redis.call('ZADD', KEYS[1], string.format('%d', over - over % 2 + odd), entry)
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = entry, message, odd
    bytes = bytes + #message
  else
    redis.call('ZREM', KEYS[1], entry)
    redis.call('HDEL', KEYS[3], entry)
  end
end
local next_one = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
if next_one then reply[1] = math.max(0, math.min(LONGEST, tonumber(next_one) - now)) end
return reply
