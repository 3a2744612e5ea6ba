-- Bind a session to an agent if the key still holds what the caller has seen there, unless it was revoked meanwhile.
--
-- KEYS[1]  session:{id}, a JSON object
-- KEYS[2]  the sibling :revoked, when the session was last revoked, in microseconds: by a process that asked Redis, and
--          by one that was cut off, told later
-- ARGV[1]  the value that the caller has seen at KEYS[1]; "" for nothing, and for a type other than a string
-- ARGV[2]  "1": the caller knows that another type is there
-- ARGV[3]  the JSON object to write
-- ARGV[4]  ttl in milliseconds; "-1": without end
-- ARGV[5]  "": that ttl. Else the session ends no sooner than the value there. The agent's index is ready for so many
--          milliseconds; "-1": for any ttl, and for none
-- ARGV[6]  the marks at KEYS[2] that the bind comes after: those there when it began; when it was made, for one made
--          while Redis was away
-- ARGV[7]  when it was made, in microseconds, by the clock of the process that made it
--
-- Reply: {1, "", its PTTL} if bound; {0, the value there, its PTTL} if that is not as expected; {-1, "", 0} if revoked.

local held = text(KEYS[1])
local other = not held and redis.call('EXISTS', KEYS[1]) == 1
if (held or '') ~= ARGV[1] or (other and ARGV[2] ~= '1') or (not held and not other and ARGV[2] == '1') then
  return {0, held or '', redis.call('PTTL', KEYS[1])}
end
local ttl = tonumber(ARGV[4])
local keeps = false
if held and ARGV[5] ~= '' and ttl ~= -1 then
  local left, ready = redis.call('PTTL', KEYS[1]), tonumber(ARGV[5])
  keeps = left == -1 or left > ttl
  if keeps then
    if ready ~= -1 and (left == -1 or left > ready) then return {0, held, left} end
    ttl = left
  end
end
local asked, told = two_numbers(text(KEYS[2]))
local asked_before, told_before = two_numbers(ARGV[6])
-- Only the clocks say whether a revocation that was told late came after the bind.
if asked > asked_before or (told > told_before and told >= tonumber(ARGV[7])) then return {-1, '', 0} end

if keeps then
  redis.call('SET', KEYS[1], ARGV[3], 'KEEPTTL')
elseif ttl == -1 then
  redis.call('SET', KEYS[1], ARGV[3])
else
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
end
return {1, '', ttl}
