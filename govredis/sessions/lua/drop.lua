-- A session's row has changed: delete older copies, and end the fill lease, so that a row read before is not put there.
-- A binding of the async service's is deleted only if the caller says so.
--
-- KEYS[1]  session:{id}
-- KEYS[2]  the sibling :lease
-- KEYS[3]  the sibling :version: the newest version told of here, the newest that has stood here, and a digest of the
--          value that stayed here when it was told, if any did: any other value has come after that
-- ARGV[1]  the row's version
-- ARGV[2]  how long the version is remembered, in milliseconds
-- ARGV[3]  the values that are over. "any": all but a copy of that version or a newer one; "agent": older copies, and
--          records that are not another agent's; "copy": older copies; "same": the value of ARGV[4]
-- ARGV[4]  the agent, or the value
--
-- Reply: 1 if there was something and is gone, else 0.

local version = tonumber(ARGV[1])
local held = text(KEYS[1])
local is_over = true
if ARGV[3] == 'same' then
  if held ~= ARGV[4] then return 0 end
else
  local copied = held and version_of(held)
  if copied and tonumber(copied) >= version then return 0 end
  if held and not copied then
    is_over = ARGV[3] ~= 'copy'
    if ARGV[3] == 'agent' then
      local agent = agent_of(held)
      is_over = not agent or agent == ARGV[4]
    end
  end
end
-- Deleting comes first: a script that has written may go on writing when Redis is out of memory.
redis.call('DEL', KEYS[2])
local had = is_over and redis.call('DEL', KEYS[1]) or 0
local told, stood, stayed = two_numbers(text(KEYS[3]))
local stays = is_over and '' or redis.sha1hex(held)
if stayed ~= '' and stayed ~= stays then stood = math.max(stood, told) end
if is_over then stood = math.max(stood, version) end
local versions = string.format('%d %d %s', math.max(told, version), stood, stays)
redis.call('SET', KEYS[3], versions, 'PX', ARGV[2])
return had
