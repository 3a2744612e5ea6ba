-- Give back what is held, to those that have waited longest; or leave the queue. After queue.lua and slots.lua.
--
-- KEYS[1]  the holders
-- KEYS[4]  the waiters; under '' the last releases: of whom, a space, with which token, and a semicolon, or a comma where
--          it was not the caller's any more
-- ARGV[1]  owner token of the caller
-- ARGV[2]  fencing token of the caller; 0 if it does not know, its acquire having got no reply
-- ARGV[3]  how long the fence is kept, in milliseconds
-- ARGV[4]  slots
--
-- Reply: 1 if released, now or by the same call arriving before, 0 if it was not the caller's (any more).

local mark = ARGV[1] .. ' ' .. ARGV[2]
local marks = redis.call('HGET', KEYS[4], '') or ''
local released = redis.call('ZREM', KEYS[1], ARGV[1])
forget(ARGV[1])
if released == 0 and string.find(marks, mark .. ';', 1, true) then return 1 end

local last, whole, made = read_fence()
local before = last
last, whole = hand_over(last, whole, tonumber(ARGV[4]))
if last > before then write_fence(last, whole, made, ARGV[3]) end
if released == 1 or ARGV[2] ~= '0' then
  -- The last ones: others may release before the same call arrives again. Also what was not its any more, that an
  -- extension of it that is still on its way finds that it is over, whatever was lost before.
  redis.call('HSET', KEYS[4], '', string.sub(mark .. (released == 1 and ';' or ',') .. marks, 1, 1000))
  redis.call('PEXPIRE', KEYS[4], KEPT_MS)
end
return released
