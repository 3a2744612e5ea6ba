-- Publish the events of committed transactions, unless another relay has come first. After append.lua, which has the first
-- key and two arguments.
--
-- KEYS[2]  its sibling "state". Here it has `run`, a token of the last run, and `told`, the ids of the events that it
--          published: PostgreSQL may still have these, where that run died before it deleted them
-- ARGV[3]  the token that the state must have, or ""
-- ARGV[4]  the token of this run
-- ARGV[5]  the ids of these events
-- ARGV[6]  an event: topic, ARGV[7] id, ARGV[8] entity, ARGV[9] microsecond, ARGV[10] payload; and so on in fives
--
-- Reply: 1, a second time too; 0 if the token is another's: nothing was published.

local run = redis.call('HGET', KEYS[2], 'run') or ''
if run == ARGV[4] then return 1 end
if run ~= ARGV[3] then return 0 end
for i = 6, #ARGV, 5 do
  local failed = append(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
  if failed then return failed end
end
redis.call('HSET', KEYS[2], 'run', ARGV[4], 'told', ARGV[5])
return 1
