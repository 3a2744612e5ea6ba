-- Bind a session to an agent, unless it was revoked meanwhile.
--
-- KEYS[1]  session:{id}, a JSON object
-- KEYS[2]  the sibling :revoked, when the session was last revoked, in microseconds
-- ARGV[1]  the JSON object to write, up to but without its bind_count and closing brace
-- ARGV[2]  agent_id, as it stands in that JSON
-- ARGV[3]  bound_at, as it stands in that JSON: with agent_id it tells a call that arrives twice
-- ARGV[4]  ttl in milliseconds
-- ARGV[5]  "1": only if the session is unbound or already this agent's
-- ARGV[6]  the newest mark at KEYS[2] that the bind comes after: the one there when it began; when it was made, for one
--          made while Redis was away
--
-- Reply: {1, the JSON now at the key, its ttl} if bound, {0, the JSON at the key, its ttl} if refused, {-1, "", 0} if
-- revoked since; a ttl is PTTL's.
-- The value is never re-encoded here: cjson turns [] into {}.

local old = redis.call('GET', KEYS[1])
local count = 0
if old then
  local ok, session = pcall(cjson.decode, old)
  -- What cjson cannot read (nested too deep, not JSON at all) is somebody's nevertheless.
  local readable = ok and type(session) == 'table'
  local mine = readable and session.agent_id == ARGV[2]
  if (mine and session.bound_at == ARGV[3]) or ARGV[5] == '1' then
    return {mine and 1 or 0, old, redis.call('PTTL', KEYS[1])}
  end
  count = readable and tonumber(session.bind_count) or 1
end
if tonumber(redis.call('GET', KEYS[2]) or '0') > tonumber(ARGV[6]) then return {-1, '', 0} end

local new = ARGV[1] .. string.format(', "bind_count": %d}', count + 1)
redis.call('SET', KEYS[1], new, 'PX', ARGV[4])
return {1, new, tonumber(ARGV[4])}
