-- Takes undelivered requests of several streams, in their order, up to a number of rows.
-- ARGV: prefix worker max_rows max_rows_below_high, then pairs: stream, '1' if it is below class high
-- A request with more rows than max_rows is taken if nothing else has been.
-- Returns {{stream, {{entry, fields}, …}}, …}.
local worker, left, below = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local group, alone, taken = 'workers', true, {}

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

for i = 5, #ARGV, 2 do
  local stream, is_below = ARGV[i], ARGV[i + 1] == '1'
  local from = last_delivered(stream)
  local room = is_below and math.min(left, below) or left
  if room > 0 then
    local count, rows = 0, 0
    for _, entry in ipairs(redis.call('XRANGE', stream, '(' .. from, '+', 'COUNT', room)) do
      local n = entry[2][3] == 'n' and tonumber(entry[2][4]) or 1
      if rows + n > room and not (alone and count == 0) then break end
      count, rows, alone = count + 1, rows + n, false
    end
    if count > 0 then
      local read = redis.call('XREADGROUP', 'GROUP', group, worker, 'COUNT', count, 'STREAMS', stream, '>')
      taken[#taken + 1] = read[1]
      left = left - rows
      if is_below then below = below - rows end
    end
  end
end
return taken
