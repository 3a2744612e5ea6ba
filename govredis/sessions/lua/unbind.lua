-- End a session, if it belongs to the agent given, and leave a mark that stops binds that began before. A value that
-- cannot be read ends too, if the agent's index names it.
--
-- KEYS[1]  session:{id}
-- KEYS[2]  the sibling :revoked, when the session was last revoked, in microseconds: by a process that asked Redis, and
--          by one that was cut off, told later
-- KEYS[3]  the sibling :lease, with which a copy of the session's row would be put here
-- ARGV[1]  agent_id, or "" for any
-- ARGV[2]  when it was revoked, in microseconds, for a revocation made while Redis was away; "" for now
-- ARGV[3]  how long the mark is kept at least, in milliseconds
-- ARGV[4]  for a revocation made while Redis was away: the value that the caller has seen at KEYS[1]; "" for nothing
-- ARGV[5]  for the same: "1" if that value is over, "0" if it came later, and stays
--
-- Reply: 1 if it was there and is gone, else 0; -1 if the value is another than the caller has seen.

local old = text(KEYS[1])
if ARGV[1] ~= '' and old then
  local agent = agent_of(old)
  if agent and agent ~= ARGV[1] then return 0 end
end
local asked, told = two_numbers(text(KEYS[2]))
local at = tonumber(ARGV[2])
if at then
  if (old or '') ~= ARGV[4] then return -1 end
  told = math.max(told, at)
else
  local time = redis.call('TIME')
  -- Newer than a mark that a bind in between may have seen, even if the clock was set back.
  asked = math.max(time[1] * 1000000 + time[2], asked + 1)
end
-- A session bound before the revocation, here or by a process that was cut off, would have ended by then.
local kept = math.max(tonumber(ARGV[3]), redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2]))
kept = math.min(kept, 1e12)  -- no ttl of ours is longer, and Redis refuses an end beyond its time
-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[3])
local had = ARGV[5] == '0' and 0 or redis.call('DEL', KEYS[1])
local marks = told > 0 and string.format('%d %d', asked, told) or string.format('%d', asked)
redis.call('SET', KEYS[2], marks, 'PX', string.format('%d', kept))
return had
