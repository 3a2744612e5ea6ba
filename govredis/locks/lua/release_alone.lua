-- Release a lock for which nobody waits: the beginning of release.lua, which does all else. It would do the same here, with
-- more work for Redis.
--
-- KEYS[1]  lock:{resource}
-- KEYS[2]  its sibling "fence"
-- KEYS[3]  its sibling "queue"
-- ARGV[1]  owner token of the caller
-- ARGV[2]  fencing token of the caller
-- ARGV[3]  how long the fence is kept, in milliseconds
--
-- Reply: as release.lua's; none where the lock is not the caller's, somebody waits, or the fence is not that token.

if redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('GET', KEYS[2]) == ARGV[2]
  and redis.call('ZCARD', KEYS[3]) == 0 then
  redis.call('SET', KEYS[2], string.format('%d', ARGV[2] + 1), 'PX', ARGV[3])
  return redis.call('DEL', KEYS[1])
end
