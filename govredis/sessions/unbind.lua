-- End a session, if it belongs to the agent given, and leave a mark that no bind begun before gets past. One that the
-- agent's index names and nobody can read is ended too.
--
-- KEYS[1]  session:{id}
-- KEYS[2]  the sibling :revoked, when the session was last revoked, in microseconds
-- KEYS[3]  the sibling :lease, with which a copy of the session's row would be put here
-- ARGV[1]  agent_id, or "" for whoever's
-- ARGV[2]  when it was revoked, in microseconds, for a revocation made while Redis was away; "" for now
-- ARGV[3]  how long the mark is kept at least, in milliseconds
--
-- Reply: 1 if it was there and is gone, else 0.

local old = redis.call('GET', KEYS[1])
if ARGV[1] ~= '' and old then
  local ok, session = pcall(cjson.decode, old)
  if ok and (type(session) ~= 'table' or session.agent_id ~= ARGV[1]) then return 0 end
end
local mark = tonumber(redis.call('GET', KEYS[2]) or '0')
local at = tonumber(ARGV[2])
if not at then
  local time = redis.call('TIME')
  at = time[1] * 1000000 + time[2]
  -- A clock that was set back: newer than the mark that a bind in between may have seen all the same.
  if at <= mark then at = mark + 1 end
end
-- What was bound before it, here or by a process cut off from us, would have ended by then.
local kept = math.max(tonumber(ARGV[3]), redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2]))
-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[3])
local had = redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], string.format('%d', math.max(at, mark)), 'PX', string.format('%d', kept))
return had
