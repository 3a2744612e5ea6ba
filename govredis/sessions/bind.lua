-- Bind a session to an agent.
--
-- KEYS[1]  session:{id}, a JSON object
-- ARGV[1]  the JSON object to write, up to but without its bind_count and closing brace
-- ARGV[2]  agent_id, as it stands in that JSON
-- ARGV[3]  bound_at, as it stands in that JSON: with agent_id it tells a call that arrives twice
-- ARGV[4]  ttl in milliseconds
-- ARGV[5]  "1": only if the session is unbound or already this agent's
--
-- Reply: {1, the JSON now at the key} if bound, {0, the JSON at the key} if refused. The value is never re-encoded here:
-- cjson turns [] into {}.

local old = redis.call('GET', KEYS[1])
local count = 0
if old then
  local ok, session = pcall(cjson.decode, old)
  if ok and type(session) == 'table' then
    count = tonumber(session.bind_count) or 0
    if session.agent_id == ARGV[2] and session.bound_at == ARGV[3] then
      return {1, old}
    end
    if ARGV[5] == '1' then
      if session.agent_id == ARGV[2] then return {1, old} end
      return {0, old}
    end
  end
end

local new = ARGV[1] .. string.format(', "bind_count": %d}', count + 1)
redis.call('SET', KEYS[1], new, 'PX', ARGV[4])
return {1, new}
