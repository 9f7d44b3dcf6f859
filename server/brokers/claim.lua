-- Takes waiting requests of several streams, in the order of order.lua, up to a number of rows.
-- ARGV: prefix worker max_rows max_rows_below_high slack_below_ms|'', then pairs: stream, '1' if it is below class high
-- max_rows_below_high caps what is below class high and has slack_below_ms or more.
-- A request with more rows than there is room is taken if nothing else has been.
-- What the group has delivered is what has been looked at here: a blocking read gives only what comes after it.
-- Returns {{stream, {{entry, fields}, …}}, …}.
local prefix, worker, left, below = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local slack_ms = tonumber(ARGV[5])
local group, taken, first = 'workers', {}, true

local function last_delivered(stream)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if not groups.err then
    for _, fields in ipairs(groups) do
      if fields[2] == group then
        for i = 1, #fields, 2 do
          if fields[i] == 'last-delivered-id' then return fields[i + 1] end
        end
      end
    end
  end
  redis.call('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
  return '0-0'
end

-- What came without a place in the order (from another release, or foreign) gets one.
local function look(stream, place)
  local last = last_delivered(stream)
  repeat
    local found = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 64)
    for _, entry in ipairs(found) do
      last = entry[1]
      if entry[2][5] ~= 'c' then order_add(prefix, place, '', last, tonumber(string.match(last, '^%d+'))) end
    end
    if #found > 0 then redis.call('XGROUP', 'SETID', stream, group, last) end
  until #found < 64 or redis.call('EXISTS', prefix .. 'flows:' .. place) == 1
end

local function fitting(stream, place, room, below_ms)
  while room > 0 do
    local entry, owner = order_peek(prefix, place, below_ms)
    if not entry then return nil end
    local found = redis.call('XRANGE', stream, entry, entry)[1]
    if found and #redis.call('XPENDING', stream, group, entry, entry, 1) == 0 then
      local fields = found[2]
      local rows = fields[3] == 'n' and tonumber(fields[4]) or 1
      local cost_us = fields[5] == 'c' and tonumber(fields[6]) or 0
      if rows > room and not first then return nil end
      return {entry = entry, fields = fields, owner = owner, rows = rows, cost_us = cost_us}
    end
    order_leave(prefix, place, owner, entry)  -- it has ended, or a blocking read took it
  end
end

for i = 6, #ARGV, 2 do
  local stream, is_below = ARGV[i], ARGV[i + 1] == '1'
  local place, mine = string.sub(stream, #prefix + #'queue:' + 1), {}
  look(stream, place)
  while true do
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
