-- Give a session that exists its whole ttl again, and never less than it has.
--
-- KEYS[1]  session:{id}
-- ARGV[1]  ttl in milliseconds
--
-- Reply: 1 if the session exists, else 0.

local left = redis.call('PTTL', KEYS[1])
if left == -2 then return 0 end
if left >= 0 and left < tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 1
