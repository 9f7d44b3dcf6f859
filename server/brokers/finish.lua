-- The one terminal transition of a request, whoever asks for it: finish, cancel, expiry, poison.
-- ARGV: prefix id status result attempt ttl_ms images ended_event tell stream entry
--   attempt  a token of this call: repeating the call after a lost answer returns 1 again; the pictures
--            wait under res:<id>:<i>:<attempt> and get their names here
--   tell     '1': workers hear of it on the control stream;  'dead': the message is kept as a dead letter
--   stream, entry   of a worker's claim, '' otherwise: removed even if the request is not known any more
-- Returns 1 to the one that made the transition, 0 to everybody else.
local prefix, id, status, result, attempt, ttl_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local tell, group = ARGV[9], 'workers'
local small = 16384  -- bytes: pictures that are no more together go with the reply, which saves fetching them
local req = prefix .. 'req:' .. id

local function leave(stream, entry)
  redis.pcall('XACK', stream, group, entry)
  redis.call('XDEL', stream, entry)
end

local f = redis.call('HMGET', req, 'status', 'attempt', 'deployment', 'class', 'version', 'entry', 'reply_to',
  'cost_us', 'events', 'owner')
if f[1] ~= 'queued' and f[1] ~= 'running' then
  if ARGV[10] ~= '' then leave(ARGV[10], ARGV[11]) end
  return (f[1] and f[2] == attempt) and 1 or 0
end

local deployment, class, version, entry = f[3], f[4], f[5], f[6]
local time = redis.call('TIME')
local now_ms = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('HSET', req, 'status', status, 'result', result, 'attempt', attempt, 'ended_ms', now_ms)
redis.call('PEXPIRE', req, ttl_ms)
redis.call('UNLINK', prefix .. 'source:' .. id)
local names, bytes = {}, 0
for i = 0, tonumber(ARGV[7]) - 1 do
  names[i + 1] = prefix .. 'res:' .. id .. ':' .. i
  redis.pcall('RENAME', names[i + 1] .. ':' .. attempt, names[i + 1])
  local size = redis.call('STRLEN', names[i + 1])
  bytes = size > 0 and bytes + size or math.huge
end
local reply = {'id', id, 'r', result}
if bytes <= small then
  for _, name in ipairs(names) do
    table.insert(reply, 'p')
    table.insert(reply, redis.call('GET', name))
  end
end

local pins = prefix .. 'pins:' .. deployment
if redis.call('HINCRBY', pins, version, -1) <= 0 then redis.call('HDEL', pins, version) end
local cost_us, owed = string.format('%.0f', 0 - tonumber(f[8])), prefix .. 'owed:' .. deployment .. ':' .. class
redis.call('HINCRBY', prefix .. 'load:' .. deployment, class, cost_us)
if redis.call('HINCRBY', owed, f[10], cost_us) <= 0 then redis.call('HDEL', owed, f[10]) end

local stream = prefix .. 'queue:' .. deployment .. ':' .. class
if tell == 'dead' then
  local kept = redis.call('XRANGE', stream, entry, entry)
  if kept[1] then
    redis.call('XADD', prefix .. 'dead:' .. deployment, 'MAXLEN', '~', 1000, '*', unpack(kept[1][2]))
  end
elseif tell == '1' then
  redis.call('XADD', prefix .. 'control', 'MAXLEN', '~', 1000, '*', 'id', id)
end
leave(stream, entry)
order_leave(prefix, deployment .. ':' .. class, f[10], entry)

for gateway in string.gmatch(f[7], '[^,]+') do
  local replies = prefix .. 'replies:' .. gateway
  redis.call('XADD', replies, 'MAXLEN', '~', 4096, '*', unpack(reply))
  redis.call('PEXPIRE', replies, 3600000)
end
if f[9] == '1' then
  redis.call('XADD', prefix .. 'events:' .. id, '*', 'e', ARGV[8])
  redis.call('PEXPIRE', prefix .. 'events:' .. id, ttl_ms)
end
return 1
