-- A sliding window log: the beginning of the scripts that decide over one or change it, which use these functions.
--
-- KEYS[1]  the ZSET: members end in "-{i}", scores are server seconds with microseconds. An entry whose score lies in the
--          future is a reservation, or another client's: it counts like any other
-- KEYS[2]  its sibling: the longest window known to be used on the key, in microseconds. It ends with the key or later
--
-- Reply: none.
--
-- An entry stays for as long as somebody may count it, and so does the key. Other clients know nothing of the sibling. They
-- prune by their own window, and give the key that window and a minute as its TTL. So a TTL that is longer than the
-- sibling's says that another client has written since we last did, at the time of the newest entry.
--
-- Its window is no longer than that TTL plus the age of that entry, by its own clock, whichever that is. We keep this bound
-- in the sibling like a window of ours, and never take it from a TTL that we gave: it does not grow by itself. No TTL is
-- shortened, and a log of others that has no TTL gets none.
--
-- So a log holds at most the entries that its clients admit within the longest window that any of them has used: since the
-- log was last empty for so long, 366 days at most, and 366 days where no TTL says less.

-- A key outlives its entries by a minute, as those of other clients; by up to ten seconds less, as it is renewed that often.
-- A longer minute than theirs would hide a window of theirs that is a little longer than ours.
local SLACK_MS, KEPT_EACH_MS = 60000, 10000
-- TTLs that one script gives two keys may differ by so much, or are read so: Redis 6.2's clock goes on within a script, also
-- where the machine stalls.
local APART_MS = 1000
-- The widest window, twice: a second may start at the end of the first.
local LONGEST_KEPT_MS = 2 * 366 * 86400 * 1000 + SLACK_MS
local LONGEST_WINDOW = 366 * 86400 * 1000000
-- Seconds until the year 5138. A time in milliseconds or microseconds since 1970 is a larger number.
local NO_TIME = 100000000000
-- Members of one ZADD: Lua hands on some 8,000 values at once.
local AT_ONCE = 1000

-- Microseconds as seconds: the double that is nearest, as Redis reads a score, and hands it on with all its digits. Both
-- sides of every comparison go through here, so rounding cannot reorder them.
local function seconds(us)
  return us / 1000000
end

-- The same as the lower end of a range that it does not belong to.
local function after(us)
  return string.format('(%.17g', us / 1000000)
end

-- The first microsecond that is not before a score: other clients' scores may lie between two.
local function microseconds(score)
  score = math.max(0, tonumber(score))
  local us = math.floor(score * 1000000 + 0.5)
  if seconds(us) < score then us = us + 1 end
  return us
end

-- The score of the last entry, as text; nil where there is none.
local function last_score()
  return redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
end

-- The same where it is now or later: a reservation, or the entry of a client whose clock is ahead. Most logs have none, and
-- that costs Redis less to find out than the score does.
local function last_score_from(now)
  return redis.call('ZCOUNT', KEYS[1], seconds(now), '+inf') > 0 and last_score() or nil
end

-- The error for a last score that is no time in seconds, and would count for ever; nil for any other score.
local function no_time(score)
  if not score or (tonumber(score) or NO_TIME) < NO_TIME then return nil end
  return redis.error_reply('SCORE ' .. score .. ' is no time: scores must be seconds since 1970, and another client writes ' ..
    'milliseconds, or the like; when that has ended, reset the identity')
end

-- The longest window ever used on the key; 0 where it is unknown, or where another client has planted no window.
local function longest_used()
  local longest = tonumber(redis.call('GET', KEYS[2])) or 0
  return longest > 0 and longest <= LONGEST_WINDOW and math.floor(longest) or 0
end

-- The score of the `nth` entry from the end, without the spared: see look. There are always `nth` of them.
local function nth_from_the_end(nth, spared)
  local function at(rank)
    rank = string.format('%d', rank)
    return redis.call('ZRANGE', KEYS[1], rank, rank, 'WITHSCORES')[2]
  end
  if not spared then return at(-nth) end
  local low, high = 0, redis.call('ZCARD', KEYS[1]) - nth
  while low < high do
    local middle = math.ceil((low + high) / 2)
    local score = at(middle)
    if redis.call('ZCOUNT', KEYS[1], score, '+inf') - spared(tonumber(score), score) >= nth then
      low = middle
    else
      high = middle - 1
    end
  end
  return at(low)
end

-- Are `needed` more within every limit? `limits` has each limit and its window in turn. `spared(score, bound)`, if given,
-- returns how many entries from a score on do not count (`bound` is the score as ZCOUNT takes it). `unasked`: admitted
-- whatever the answer is. Returns whether they are; the index of the deciding limit, and its remaining; how long to
-- wait; and the longest window.
local function look(now, limits, needed, spared, unasked)
  local admitted, deciding, least, wait, longest, old = true, 1, nil, 0, 0, 0
  local entries = redis.call('ZCARD', KEYS[1])
  for i = 1, #limits, 2 do
    local limit, window = tonumber(limits[i]), tonumber(limits[i + 1])
    -- There are few before a window, most of the time: so they are counted, not those in it.
    local since = seconds(now - window)
    local before = redis.call('ZCOUNT', KEYS[1], '-inf', since)
    if window > longest then longest, old = window, before end
    local used = entries - before
    if spared then used = math.max(0, used - spared(since, after(now - window))) end
    local remaining = limit - used - needed
    if remaining < 0 and not unasked then
      -- Admitted once the entry has aged out that leaves no room for it, if nobody else comes.
      local freed = microseconds(nth_from_the_end(limit - needed + 1, spared)) + window - now
      if admitted or freed > wait then
        admitted, deciding, least, wait = false, (i + 1) / 2, limit - used, freed
      end
    elseif admitted and (not least or remaining < least) then
      deciding, least = (i + 1) / 2, remaining
    end
  end
  return admitted, deciding, math.max(0, least), wait, longest, old
end

-- Add `cost` entries, or those of them that are not there yet. Returns how many those were.
local function add(at, cost, member)
  local score = seconds(at)
  if cost == 1 then return redis.call('ZADD', KEYS[1], 'NX', score, member .. '-1') end
  local added, entries = 0, {}
  for i = 1, cost do
    entries[#entries + 1] = score
    entries[#entries + 1] = member .. '-' .. i
    if #entries == 2 * AT_ONCE or i == cost then
      added = added + redis.call('ZADD', KEYS[1], 'NX', unpack(entries))
      entries = {}
    end
  end
  return added
end

-- How many milliseconds a key is kept whose newest entry may count for so many microseconds.
local function kept_for(us)
  return math.min(math.ceil(us / 1000) + SLACK_MS, LONGEST_KEPT_MS)
end

-- Write `cost` entries at a time, and keep all for as long as they may count: `window`, or longer. `old`: how many entries
-- lie before that window. `ahead`: the last score before that, or as from last_score_from.
--
-- Returns how many of the entries were not there yet, and the microsecond of the last entry that is now or later, else
-- `at`. Third: how many milliseconds from now on that entry may count.
--
-- To keep costs more than to decide. So that is left out where it was done within the last ten seconds: the TTL is the
-- longest known window's, with a slack that is shorter by less than that. And it is ours: the sibling has it too, or a
-- longer one. No entry is still to come then.
local function write(now, window, old, at, cost, member, ahead)
  -- The sibling's TTL is read first and set last. So it is longer, by far less than a millisecond, unless others set the
  -- key's.
  local known, left_ms, others_ms = longest_used(), redis.call('PTTL', KEYS[2]), redis.call('PTTL', KEYS[1])
  local newest = ahead and math.max(at, microseconds(ahead)) or at
  local full = kept_for(known)
  local is_ours = left_ms >= others_ms and left_ms <= others_ms + APART_MS
  local kept = known >= window and newest <= now and is_ours and others_ms <= full and others_ms > full - KEPT_EACH_MS

  local longest = math.max(known, window)
  if others_ms > 0 and not is_ours then
    -- An entry that is still to come is a lease's, or reserved: it is not theirs.
    local past = redis.call('ZCOUNT', KEYS[1], '-inf', seconds(now))
    local newest = past > 0 and redis.call('ZRANGE', KEYS[1], past - 1, past - 1, 'WITHSCORES')[2] or 0
    local theirs = others_ms * 1000 + math.max(0, now - microseconds(newest))
    -- Where it is shorter than the sibling's, a lease or a reservation has raised both, and they have set the key's since.
    -- That tells of a longer window if it is more than we would have given the key without these.
    if others_ms > left_ms or theirs > (full + APART_MS) * 1000 then
      longest = math.max(longest, math.min(theirs, LONGEST_WINDOW))
    end
  end
  local endless = others_ms == -1

  local added = add(at, cost, member)
  if old > 0 then
    -- After that: with its last entry the key would go, and its TTL.
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', seconds(now - (endless and LONGEST_WINDOW or longest)))
  end
  if kept then return added, newest, others_ms end

  local kept_ms = kept_for(math.max(0, newest - now) + longest)
  if kept_ms <= others_ms then
    kept_ms = others_ms
  elseif not endless then
    redis.call('PEXPIRE', KEYS[1], string.format('%d', kept_ms))
  end
  if longest > known then
    redis.call('SET', KEYS[2], string.format('%d', longest), 'PX', string.format('%d', kept_ms))
  else
    redis.call('PEXPIRE', KEYS[2], string.format('%d', kept_ms))
  end
  return added, newest, kept_ms
end

-- When a limit of that window is full again: its newest entry, of that microsecond, has aged out.
local function reset_after(now, window, newest)
  return math.max(0, newest + window - now)
end
