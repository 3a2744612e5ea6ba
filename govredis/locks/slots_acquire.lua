-- Take a slot, or the whole; or say that there is no room, and queue up for it. After queue.lua and slots.lua.
--
-- KEYS[1]  the holders
-- ARGV[1]  owner token of the caller
-- ARGV[2]  ttl in milliseconds
-- ARGV[3]  floor: the last fencing token that the caller's host knows of
-- ARGV[4]  how long the fence is kept after the lease, in milliseconds
-- ARGV[5]  1: queue up if there is no room, or stay in the queue and be seen alive; 0: do not wait for it; 2: nor take it
--          anew, if it was the caller's and is not any more
-- ARGV[6]  slots
--
-- Reply: {1, fencing token} if granted (also if it was granted to this owner before: it was handed over, or the reply was
-- lost; then with a new token), {0, 0} if there is no room, others have waited longer, or it is not taken anew.

local owner, slots = ARGV[1], tonumber(ARGV[6])
local last, whole, made = read_fence()

if not redis.call('ZSCORE', KEYS[1], owner) then
  if ARGV[5] == '2' then return {0, 0} end
  local room = fits(owner, slots)
  if room then
    -- Leases have ended without a release. Whoever came first is next, not whoever happens to notice.
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
