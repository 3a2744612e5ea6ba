-- Add what a process has counted to the account: to the totals, and to the minute and the hour of a moment.
--
-- KEYS[1]  the hash tag of the account's keys, {...}
-- KEYS[2]  the totals. With the record they keep the script from a slot that is on its way, where a second minute or hour
--          would begin
-- KEYS[3]  the record of the process
-- ARGV[1]  now in microseconds, or "" for the server's clock (tests only pass one)
-- ARGV[2]  the minute since 1970 that the counts are of, or "" for this one
-- ARGV[3]  how many names there is room for in the totals
-- ARGV[4]  how long the record of the process is kept, in ms
-- ARGV[5]  a name, ARGV[6] its count that the process knows to have been told, ARGV[7] its count now, and so on. Counts
--          are since the process began.
--
-- Reply: now in microseconds, and how many names were left out for want of room.
--
-- The record of a process has what it has told, so a call that arrives twice, or late, adds nothing the second time.

local KEPT = 26 * 3600 * 1000
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local this = math.floor(now / 60000000)
local minute = math.min(tonumber(ARGV[2]) or this, this)
local totals, record = KEYS[2], KEYS[3]

local names, counts, bases = {}, {}, {}
for i = 5, #ARGV, 3 do
  names[#names + 1], bases[#bases + 1], counts[#counts + 1] = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
end

local told = redis.call('HMGET', record, unpack(names))
local summed = redis.call('HMGET', totals, unpack(names))
local room
local left_out = 0
local news, added, grown, sums = {}, {}, {}, {}
for n, name in ipairs(names) do
  local more = counts[n] - (tonumber(told[n]) or bases[n])
  if more > 0 then
    news[#news + 1], news[#news + 2] = name, counts[n]
    if not summed[n] then
      if not room then
        local size = redis.call('HLEN', totals)
        room = tonumber(ARGV[3]) - size
        if size == 0 then redis.call('HSET', totals, 'since', string.format('%d', now)) end
      end
      room = room - 1
    end
    if summed[n] or room >= 0 then
      added[#added + 1], grown[#grown + 1] = name, more
      sums[#sums + 1], sums[#sums + 2] = name, (tonumber(summed[n]) or 0) + more
    else
      left_out = left_out + 1
    end
  end
end
if #news == 0 then return {now, 0} end
redis.call('HSET', record, unpack(news))
redis.call('PEXPIRE', record, ARGV[4])
if #added == 0 then return {now, left_out} end
redis.call('HSET', totals, unpack(sums))

for _, part in ipairs({{'minute:', 1}, {'hour:', 60}}) do
  local number = math.floor(minute / part[2])
  local ends = ((number + 1) * part[2]) * 60000 + KEPT - math.floor(now / 1000)
  if ends > 0 then
    local bucket = KEYS[1] .. ':' .. part[1] .. string.format('%d', number)
    local held, values = redis.call('HMGET', bucket, unpack(added)), {}
    for n, name in ipairs(added) do
      values[#values + 1], values[#values + 2] = name, (tonumber(held[n]) or 0) + grown[n]
    end
    -- All fields are new at least when the key is.
    if redis.call('HSET', bucket, unpack(values)) == #added then
      redis.call('PEXPIRE', bucket, string.format('%d', ends))
    end
  end
end
return {now, left_out}
