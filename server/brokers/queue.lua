-- The load of a deployment, or the place of one request in its queue.
-- ARGV: prefix 'load' deployment owners_at_most
--   -> {waiting high, normal, low, running, cost_us high, normal, low, {owner, cost_us, …} high, normal, low}
-- ARGV: prefix 'place' place owner entry -> requests that no worker has yet and that may go before the entry
local prefix, group = ARGV[1], 'workers'

if ARGV[2] == 'place' then
  local place, mine = ARGV[3], ARGV[4]
  local rank = redis.call('ZRANK', prefix .. 'flow:' .. place .. ':' .. mine, ARGV[5])
  if not rank then return 0 end
  local ahead = rank
  for _, owner in ipairs(redis.call('ZRANGE', prefix .. 'flows:' .. place, 0, 63)) do
    if owner ~= mine then
      ahead = ahead + math.min(redis.call('ZCARD', prefix .. 'flow:' .. place .. ':' .. owner), rank + 1)
    end
  end
  return ahead
end

local waiting, running, costs, owed = {}, 0, {}, {}
for i, class in ipairs({'high', 'normal', 'low'}) do
  local stream = prefix .. 'queue:' .. ARGV[3] .. ':' .. class
  local pending = redis.pcall('XPENDING', stream, group)
  local claimed = not pending.err and pending[1] or 0
  waiting[i] = redis.call('XLEN', stream) - claimed
  running = running + claimed
  costs[i] = tonumber(redis.call('HGET', prefix .. 'load:' .. ARGV[3], class) or 0)
  local owners = prefix .. 'owed:' .. ARGV[3] .. ':' .. class
  owed[i] = redis.call('HLEN', owners) <= tonumber(ARGV[4]) and redis.call('HGETALL', owners) or {}
end
return {waiting[1], waiting[2], waiting[3], running, costs[1], costs[2], costs[3], owed[1], owed[2], owed[3]}
