-- Take a slot, or the whole; or say that there is no room, and queue the caller. After queue.lua and slots.lua.
--
-- KEYS[1]  the holders
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  floor: the last fencing token that the caller's host knows
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
-- ARGV[5]  if there is no room: 1: queue the caller, or note that it is still alive; 0: do not wait; 2: a confirmation: do
--          not wait, nor grant it anew if it is no longer the caller's
-- ARGV[6]  slots
--
-- Reply: {1, fencing token} if granted. An owner that has it already, by a hand-over or a lost reply, gets a new token.
-- {0, 0} if there is no room, others have waited longer, or a confirmation came too late.

local owner, slots = ARGV[1], tonumber(ARGV[6])
local last, whole, made = read_fence()

if not redis.call('ZSCORE', KEYS[1], owner) then
  if ARGV[5] == '2' then return {0, 0} end
  local room = fits(owner, slots)
  if room then
    -- Leases may have ended without a release. The longest waiter is next, not the caller that happens to notice.
    local before = last
    last, whole = hand_over(last, whole, slots)
    if last > before then write_fence(last, whole, made, ARGV[4]) end
    room = redis.call('ZSCORE', KEYS[1], owner) or (not first_waiter() and fits(owner, slots))
  end
  if not room then
    if ARGV[5] == '1' then queue_up(owner) end
    return {0, 0}
  end
end

last = math.max(tonumber(fence_after(last)), tonumber(ARGV[3]) + 1)
if wants_whole(owner) then whole = last end
hold(owner, ARGV[2])
write_fence(last, whole, made, string.format('%d', ARGV[2] + ARGV[4]))
return {1, last}
