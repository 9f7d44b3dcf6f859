-- Queues a request, pins its version and adds its predicted cost. Repeating an id changes nothing.
-- ARGV: prefix id deployment class version owner reply_to rows budget_ms cost_us message queued_event|'' ttl_ms
--   due_after_ms
-- Returns {1, entry, deadline_ms} when queued, {0, entry, deadline_ms} when known, {-1} when the version is not servable.
local prefix, id, deployment, class, version = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local req = prefix .. 'req:' .. id

local known = redis.call('HMGET', req, 'entry', 'deadline_ms')
if known[1] then return {0, known[1], known[2]} end

local servable = prefix .. 'servable:' .. deployment
if redis.call('EXISTS', servable) == 1 and redis.call('SISMEMBER', servable, version) == 0 then return {-1} end

local stream = prefix .. 'queue:' .. deployment .. ':' .. class
local entry = redis.call('XADD', stream, '*', 'id', id, 'n', ARGV[8], 'c', ARGV[10], 'm', ARGV[11])
local enqueued_ms = string.match(entry, '^(%d+)')
local deadline_ms = string.format('%.0f', tonumber(enqueued_ms) + tonumber(ARGV[9]))
local events = ARGV[12] ~= '' and '1' or '0'
redis.call('HSET', req, 'status', 'queued', 'deployment', deployment, 'class', class, 'version', version,
  'owner', ARGV[6], 'reply_to', ARGV[7], 'entry', entry, 'enqueued_ms', enqueued_ms, 'deadline_ms', deadline_ms,
  'cost_us', ARGV[10], 'events', events)
order_add(prefix, deployment .. ':' .. class, ARGV[6], entry, tonumber(enqueued_ms) + tonumber(ARGV[14]))
redis.call('HINCRBY', prefix .. 'pins:' .. deployment, version, 1)
redis.call('HINCRBY', prefix .. 'load:' .. deployment, class, ARGV[10])
redis.call('HINCRBY', prefix .. 'owed:' .. deployment .. ':' .. class, ARGV[6], ARGV[10])
if events == '1' then
  redis.call('XADD', prefix .. 'events:' .. id, '*', 'e', ARGV[12])
  redis.call('PEXPIRE', prefix .. 'events:' .. id, ARGV[13])
end
return {1, entry, deadline_ms}
