-- Give back a slot or the whole, to the longest waiters; or take the caller from the queue. After queue.lua and slots.lua.
--
-- KEYS[1]  the holders
-- KEYS[4]  the waiters; under '' the last releases. Each is an owner token, a space, a fencing token, and a semicolon; or a
--          comma where the slot was no longer the caller's
-- ARGV[1]  owner token of the caller
-- ARGV[2]  fencing token of the caller; 0 if it does not know: its acquire got no reply
-- ARGV[3]  how long the fence is kept, in milliseconds
-- ARGV[4]  slots
--
-- Reply: 1 if released, now or by an earlier arrival of the same call; 0 if it was not, or no longer, the caller's.

local mark = ARGV[1] .. ' ' .. ARGV[2]
local marks = redis.call('HGET', KEYS[4], '') or ''
local released = redis.call('ZREM', KEYS[1], ARGV[1])
forget(ARGV[1])
if released == 0 and string.find(marks, mark .. ';', 1, true) then return 1 end

if released == 1 or ARGV[2] ~= '0' then
  -- Several releases: others may release before the same call arrives again. Also slots that were no longer the caller's:
  -- an extension that is still on its way finds that its slot is over, whatever was lost before.
  redis.call('HSET', KEYS[4], '', string.sub(mark .. (released == 1 and ';' or ',') .. marks, 1, 1000))
  redis.call('PEXPIRE', KEYS[4], KEPT_MS)
end
-- Last: Redis ends a script that comes to a key which is missing while its slot is on its way to another node.
local last, whole, made = read_fence()
local before = last
last, whole = hand_over(last, whole, tonumber(ARGV[4]))
if last > before then write_fence(last, whole, made, ARGV[3]) end
return released
