-- Whether a message that has arrived is to be worked on, or is one too many: its run is parked since, or was begun by
-- another publication of the same parked message.
--
-- KEYS[1]  the run's ticket; see park.lua
-- ARGV[1]  how often it had been parked when this message was published; 0: this is not a parked one
-- ARGV[2]  which publication of it this is
-- ARGV[3]  1 if the broker says that it delivers it again, else 0
-- ARGV[4]  how long the ticket is kept from now on, in milliseconds
--
-- Reply: 1 if it is to be worked on, 0 if it is one too many.

local times, publication = tonumber(ARGV[1]), ARGV[2]
local ticket = redis.call('GET', KEYS[1])
local parked, arrived = string.match(ticket or '0:', '^(%d+):(.*)$')
parked = tonumber(parked)

if times == 0 then
  -- Its worker died after it had parked it, before it could say so to the broker. What the broker delivers for the first
  -- time is somebody's new message of the same id: the run that the ticket is of, if it was begun, is another.
  if ticket and ARGV[3] == '1' then return 0 end
  if arrived ~= '' then redis.call('DEL', KEYS[1]) end
  return 1
end
if times < parked or (times == parked and arrived ~= '' and arrived ~= publication) then return 0 end
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. publication, 'PX', ARGV[4])
return 1
