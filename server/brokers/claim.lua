-- Takes waiting requests of several streams, in the order of order.lua, up to a number of rows.
-- ARGV: prefix worker max_rows max_rows_below_high slack_below_ms|'' elsewhere|'', then pairs: stream, '1' if it is below
--   class high
-- max_rows_below_high caps what is below class high and has slack_below_ms or more.
-- elsewhere: '<version> <ms> …'; what came after that time and is of that version is left to other workers.
-- A request with more rows than there is room is taken if nothing else has been.
-- A blocking read gives what comes after the group's last delivered id. Before anything is taken here, that is moved
-- to the end of the stream: otherwise the read could give it to somebody else as well.
-- Returns {{stream, {{entry, fields}, …}}, …}.
local prefix, worker, left, below = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local slack_ms = tonumber(ARGV[5])
local group, taken, first = 'workers', {}, true
local others, left_to_others = {}, nil  -- version -> since when its entries are left; entries that were
for version, ms in string.gmatch(ARGV[6], '(%S+) (%S+)') do
  others[version], left_to_others = tonumber(ms), {}
end

-- What came without a place in the order (from another release, or foreign) gets one. Each entry is looked at once; of
-- a long queue twice as many at a claim as there is room for, which is soon ahead of what is taken.
local function look(stream, place)
  local key, count = prefix .. 'looked:' .. place, math.max(8, 2 * left)
  local last, found = redis.call('GET', key) or '0-0', nil
  repeat
    found = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', count)
    for _, entry in ipairs(found) do
      last = entry[1]
      if entry[2][5] ~= 'c' then order_add(prefix, place, '', last, tonumber(string.match(last, '^%d+'))) end
    end
    if #found > 0 then redis.call('SET', key, last) end
  until #found < count or redis.call('EXISTS', prefix .. 'flows:' .. place) == 1
end

local moved = nil  -- the stream whose group stands at its end
local function move(stream)
  if moved == stream then return end
  moved = stream
  if redis.pcall('XGROUP', 'SETID', stream, group, '$').err then
    redis.call('XGROUP', 'CREATE', stream, group, '$')
  end
end

local function is_left(entry, fields)
  local version = left_to_others and redis.call('HGET', prefix .. 'req:' .. fields[2], 'version')
  return version and others[version] and tonumber(string.match(entry, '^%d+')) > others[version]
end

local function fitting(stream, place, room, below_ms)
  while room > 0 do
    local entry, owner = order_peek(prefix, place, below_ms, left_to_others)
    if not entry then return nil end
    local found = redis.call('XRANGE', stream, entry, entry)[1]
    local is_ours = found and not is_left(entry, found[2])
    if is_ours then move(stream) end
    if found and not is_ours then
      left_to_others[entry] = true
    elseif found and #redis.call('XPENDING', stream, group, entry, entry, 1) == 0 then
      local fields = found[2]
      local rows = fields[3] == 'n' and tonumber(fields[4]) or 1
      local cost_us = fields[5] == 'c' and tonumber(fields[6]) or 0
      if rows > room and not first then return nil end
      return {entry = entry, fields = fields, owner = owner, rows = rows, cost_us = cost_us}
    else
      order_leave(prefix, place, owner, entry)  -- it has ended, or a blocking read took it
    end
  end
end

for i = 7, #ARGV, 2 do
  local stream, is_below = ARGV[i], ARGV[i + 1] == '1'
  local place, mine = string.sub(stream, #prefix + #'queue:' + 1), {}
  local open = left > 0 and (not is_below or below > 0 or slack_ms)
  if open then look(stream, place) end
  while open do
    local one = fitting(stream, place, is_below and math.min(left, below) or left, nil)
    if not one and is_below and slack_ms then one = fitting(stream, place, left, slack_ms) end
    if not one then break end
    redis.call('XCLAIM', stream, group, worker, 0, one.entry, 'RETRYCOUNT', 1, 'FORCE', 'JUSTID')
    order_charge(prefix, place, one.owner, one.cost_us, one.rows)
    order_leave(prefix, place, one.owner, one.entry)
    mine[#mine + 1] = {one.entry, one.fields}
    left, first = left - one.rows, false
    if is_below then below = below - one.rows end
  end
  if #mine > 0 then taken[#taken + 1] = {stream, mine} end
end
return taken
