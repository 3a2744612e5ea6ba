-- Take the next event of a consumer in a group, and acknowledge the one before.
--
-- KEYS[1]  the stream
-- KEYS[2]  its sibling "dead": a stream of the events that were delivered too often
-- ARGV[1]  group
-- ARGV[2]  consumer
-- ARGV[3]  the id of the entry that is done, or ""
-- ARGV[4]  where a group begins that is not there yet: an id, or "$"
-- ARGV[5]  "1": look for events of consumers that are gone, and forget consumers; "": do not
-- ARGV[6]  milliseconds after which an event is claimed from its consumer
-- ARGV[7]  deliveries of an event, at most
-- ARGV[8]  how many dead events are kept
-- ARGV[9]  how long a stream is kept that nobody adds to, in milliseconds
-- ARGV[10] milliseconds after which a consumer without events is forgotten
--
-- Reply: {is the group new, dead, missed, id, deliveries, fields}: `dead` events were set aside. `missed` events were
-- trimmed before this group could have them. The last three are left out if there is no event. A second arrival of the
-- command gets the same event.

local function number(id) return tonumber(string.match(id, '%-(%d+)$')) end

local is_new, dead, missed = 0, 0, 0

local groups = redis.call('EXISTS', KEYS[1]) == 1 and redis.call('XINFO', 'GROUPS', KEYS[1]) or {}
local delivered
for _, group in ipairs(groups) do
  local found = {}
  for i = 1, #group, 2 do found[group[i]] = group[i + 1] end
  if found['name'] == ARGV[1] then delivered = found['last-delivered-id'] end
end
if not delivered then
  redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], ARGV[4], 'MKSTREAM')
  redis.call('PEXPIRE', KEYS[1], ARGV[9])
  is_new, delivered = 1, '0-0'
end

if ARGV[3] ~= '' then redis.call('XACK', KEYS[1], ARGV[1], ARGV[3]) end

-- Events that this consumer has been given: a reply was lost, or its process ended. Then events of consumers that are gone.
while true do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])[1]
  if not pending and ARGV[5] == '1' then
    pending = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[6], '-', '+', 1)[1]
  end
  if not pending then break end
  local id, deliveries = pending[1], pending[4]
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then
    missed = missed + 1  -- it was trimmed
    redis.call('XACK', KEYS[1], ARGV[1], id)
  elseif deliveries >= tonumber(ARGV[7]) then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[8], '*',
      'group', ARGV[1], 'entry', id, 'deliveries', deliveries, unpack(entry[2]))
    redis.call('PEXPIRE', KEYS[2], ARGV[9])
    redis.call('XACK', KEYS[1], ARGV[1], id)
    dead = dead + 1
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id)
    return {is_new, dead, missed, id, deliveries + 1, entry[2]}
  end
end

if ARGV[5] == '1' then
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local found = {}
    for i = 1, #consumer, 2 do found[consumer[i]] = consumer[i + 1] end
    if found['name'] ~= ARGV[2] and found['pending'] == 0 and found['idle'] > tonumber(ARGV[10]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], found['name'])
    end
  end
end

local read = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
if not read then return {is_new, dead, missed} end
local entry = read[1][2][1]
-- Events are missing before the stream's first alone. A new group misses none.
local gap = number(entry[1]) - number(delivered) - 1
if number(delivered) > 0 and gap > 0 and redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][1] == entry[1] then
  missed = missed + gap
end
return {is_new, dead, missed, entry[1], 1, entry[2]}
