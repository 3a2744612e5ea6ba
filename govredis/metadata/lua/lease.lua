-- After a miss: take a lease, so that what is loaded now may be stored if nothing intervenes.
--
-- KEYS[1]  the value
-- KEYS[2]  its sibling "stamp"
-- KEYS[3]  its sibling "lease"
-- KEYS[4]  its sibling "tombstone"
-- ARGV[1]  a lease, unique to the call
-- ARGV[2]  how long it stands, in milliseconds
-- ARGV[3]  how long one may stand at most: a key that stands longer, or for ever, is no lease, and is written over
-- ARGV[4]  "1" to take it from its holder, else "0"
-- Reply: {lease, taken, sha1, value, stamp, tombstone}. `lease` is the lease to fill with. `taken` is 1 if this call
-- took it, else 0. `sha1` is of the value at the value's key, "" for nothing. `tombstone` is 1 if there is one, else 0.
--
-- A caller that finds the lease taken gets "" for value and stamp. It waits for the value that the taker stores, or
-- loads under the same lease: a value loaded after that is as fresh as the taker's. An invalidation takes the lease
-- away from all of them. The taker gets the value that was stored since its miss ("" for nothing, and for another type
-- than a string). A call that arrives twice has taken the lease once.
-- Leases: Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, section 3.2.1.

local value = redis.pcall('GET', KEYS[1])  -- an error where it is no string: then it is foreign
local stood = ''
if type(value) == 'string' then
  stood = redis.sha1hex(value)
elseif value then
  stood, value = 'another type', ''
end

local lease = redis.pcall('GET', KEYS[3])
if ARGV[4] == '0' and type(lease) == 'string' and lease ~= '' and lease ~= ARGV[1] then
  local left = redis.call('PTTL', KEYS[3])
  if left >= 0 and left <= tonumber(ARGV[3]) then return {lease, 0, stood, '', '', 0} end
end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
local stamp = redis.pcall('GET', KEYS[2])
if type(stamp) ~= 'string' then stamp = '' end
return {ARGV[1], 1, stood, value or '', stamp, redis.call('EXISTS', KEYS[4])}
