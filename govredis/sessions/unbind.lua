-- End a session, if it belongs to the agent given. One that the agent's index names and nobody can read is ended too.
--
-- KEYS[1]  session:{id}
-- ARGV[1]  agent_id, or "" for whoever's
--
-- Reply: 1 if it was there and is gone, else 0.

if ARGV[1] ~= '' then
  local old = redis.call('GET', KEYS[1])
  local ok, session = pcall(cjson.decode, old or '')
  if ok and (type(session) ~= 'table' or session.agent_id ~= ARGV[1]) then return 0 end
end
return redis.call('DEL', KEYS[1])
