-- Marks claimed requests as running; those that a blocking read took leave the order here.
-- ARGV: prefix worker ttl_ms, then pairs: id, running_event|''
-- Returns per id 1, or 0 if the request has ended.
local prefix, wanted = ARGV[1], {}
local time = redis.call('TIME')
local now_ms = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
for i = 4, #ARGV, 2 do
  local req = prefix .. 'req:' .. ARGV[i]
  local f = redis.call('HMGET', req, 'status', 'deployment', 'class', 'owner', 'entry')
  local status = f[1]
  local alive = status == 'queued' or status == 'running'
  if alive then
    order_leave(prefix, f[2] .. ':' .. f[3], f[4], f[5])
    redis.call('HSET', req, 'status', 'running', 'worker', ARGV[2])
    redis.call('HSETNX', req, 'started_ms', now_ms)
    if ARGV[i + 1] ~= '' then
      local events = prefix .. 'events:' .. ARGV[i]
      redis.call('XADD', events, '*', 'e', ARGV[i + 1])
      redis.call('PEXPIRE', events, ARGV[3])
    end
  end
  wanted[#wanted + 1] = alive and 1 or 0
end
return wanted
