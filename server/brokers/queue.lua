-- The load of a deployment, or the place of one request in its queue.
-- ARGV: prefix 'load' deployment      -> {waiting high, normal, low, running, cost_us high, normal, low}
-- ARGV: prefix 'place' stream entry   -> requests of the stream ahead of the entry that no worker has yet
local prefix, group = ARGV[1], 'workers'

if ARGV[2] == 'place' then
  local from = '0-0'
  local groups = redis.pcall('XINFO', 'GROUPS', ARGV[3])
  for _, fields in ipairs(not groups.err and groups or {}) do
    for i = 1, #fields, 2 do
      if fields[i] == 'last-delivered-id' then from = fields[i + 1] end
    end
  end
  local ahead = redis.call('XRANGE', ARGV[3], '(' .. from, '(' .. ARGV[4], 'COUNT', 1000)
  return #ahead
end

local waiting, running, costs = {}, 0, {}
for i, class in ipairs({'high', 'normal', 'low'}) do
  local stream = prefix .. 'queue:' .. ARGV[3] .. ':' .. class
  local pending = redis.pcall('XPENDING', stream, group)
  local claimed = not pending.err and pending[1] or 0
  waiting[i] = redis.call('XLEN', stream) - claimed
  running = running + claimed
  costs[i] = tonumber(redis.call('HGET', prefix .. 'load:' .. ARGV[3], class) or 0)
end
return {waiting[1], waiting[2], waiting[3], running, costs[1], costs[2], costs[3]}
