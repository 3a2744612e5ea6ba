-- Change a session's data, if its record is still as it was read. Its ttl stays, and an ended session stays ended.
--
-- KEYS[1]  session:{id}, a JSON object
-- KEYS[2]  the sibling :update:{nonce}, which tells a call that arrives twice
-- ARGV[1]  the JSON object that was read
-- ARGV[2]  the one to write
-- ARGV[3]  how long the call is remembered, in milliseconds: it may arrive again within that time
--
-- Reply: 1 if it was written, by this call or by the first arrival of it, else 0.

if redis.call('EXISTS', KEYS[2]) == 1 then return 1 end
if text(KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
redis.call('SET', KEYS[2], '1', 'PX', ARGV[3])
return 1
