-- Take a lock from its holder, and hand it to the longest waiter. After queue.lua and hand.lua.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- ARGV[1]  how long the fence is kept, in milliseconds
--
-- Reply: 1 if it was held, 0 if not. The fence is raised: an extension of the holder's finds that its lock is over.

if not redis.call('GET', KEYS[1]) then return 0 end

local fence = fence_after(tonumber(redis.call('GET', KEYS[2])) or 0)
local waiter = first_waiter()
if waiter then
  hand_to(waiter, fence, ARGV[1])
else
  redis.call('SET', KEYS[2], fence, 'PX', ARGV[1])
  redis.call('DEL', KEYS[1])
end
return 1
