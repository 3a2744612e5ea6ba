-- Put a copy of a session's row into the cache, unless something newer is there, or was.
--
-- KEYS[1]  session:{id}, a JSON object
-- KEYS[2]  the sibling :lease
-- KEYS[3]  the sibling :version: the newest version told of here, and the newest that has stood here
-- KEYS[4]  the sibling :revoked: a mark there is older than the lease, and the row has outlived it
-- ARGV[1]  the JSON object
-- ARGV[2]  ttl in milliseconds; "-1": without end; "": the ttl of the value there
-- ARGV[3]  the fill lease, taken before the row was written, or soon after it was read: revocations end it
-- ARGV[4]  the row's version
-- ARGV[5]  how long that is remembered, in milliseconds: for longer than a lease lasts
-- ARGV[6]  the values that it may replace. "copy": nothing, and the copy of a row; "same": the value of ARGV[7];
--          "bound", for a row that was just bound: all of these, and any other value is noted to be newer than the row
-- ARGV[7]  the value that was there before the row was read or written; "" for nothing, and for no string
-- ARGV[8]  "1": the session ends no sooner than the value there
--
-- Reply: 1 if it is in the cache, else 0; -1 if another client bound the session while the row was bound.

if text(KEYS[2]) ~= ARGV[3] then return 0 end
local version = tonumber(ARGV[4])
if two_numbers(text(KEYS[3])) > version then return 0 end
local held = text(KEYS[1])
local is_copy = not held or version_of(held)
local is_same = (held or '') == ARGV[7]
if ARGV[6] == 'bound' and not is_copy and not is_same then
  redis.call('DEL', KEYS[2])  -- a reader may take the value for the older one, and would put the row there
  redis.call('SET', KEYS[3], ARGV[4] .. ' ' .. ARGV[4], 'PX', ARGV[5])
  return -1
end
if ARGV[6] == 'copy' and not is_copy or ARGV[6] == 'same' and not is_same then return 0 end
local keeps = ARGV[2] == ''
if held and ARGV[8] == '1' and ARGV[2] ~= '-1' then
  local left = redis.call('PTTL', KEYS[1])
  keeps = left == -1 or left > tonumber(ARGV[2])  -- it was extended since the row was told what it had left
end
if keeps then
  redis.call('SET', KEYS[1], ARGV[1], 'KEEPTTL')
elseif ARGV[2] == '-1' then
  redis.call('SET', KEYS[1], ARGV[1])
else
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
redis.call('SET', KEYS[3], ARGV[4] .. ' ' .. ARGV[4], 'PX', ARGV[5])
redis.call('DEL', KEYS[4])
return 1
