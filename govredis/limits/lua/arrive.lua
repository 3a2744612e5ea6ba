-- Whether the worker runs a message that has arrived. It does not where the run was parked since, or where another
-- publication of the same parked message has begun it.
--
-- KEYS[1]  the run's ticket; see park.lua
-- ARGV[1]  how often the run had been parked when this message was published; 0: the message was never parked
-- ARGV[2]  which publication of the parked message this is
-- ARGV[3]  1 if the broker says that it delivers it again, else 0
-- ARGV[4]  how long the ticket is kept from now on, in milliseconds
--
-- Reply: 1 if the worker runs it, 0 if it drops it.

local times, publication = tonumber(ARGV[1]), ARGV[2]
local ticket = redis.call('GET', KEYS[1])
-- Another client may have planted something that is no ticket: it counts as none.
local parked, arrived = string.match(ticket or '', '^(%d%d?%d?%d?%d?%d?):(.*)$')
if not parked then ticket = nil end
parked, arrived = tonumber(parked or 0), arrived or ''

if times == 0 then
  -- A redelivery: the worker died after it had parked the run, before it could say so to the broker. A first delivery is
  -- somebody's new message with the same id: if the ticket's run was begun, it is another run.
  if ticket and ARGV[3] == '1' then return 0 end
  if arrived ~= '' then redis.call('DEL', KEYS[1]) end
  return 1
end
if times < parked or (times == parked and arrived ~= '' and arrived ~= publication) then return 0 end
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. publication, 'PX', ARGV[4])
return 1
