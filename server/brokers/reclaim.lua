-- Takes over claims whose worker's lease is gone, and own ones whose delivery never arrived.
-- ARGV: prefix worker max grace_ms lost_after_ms held ("stream entry", comma separated), then streams
-- A server that has just restarted or become master may have let every lease lapse: nothing is taken from others until
-- each has had the time of a lease to renew. Its replication id is new then; `master` keeps it with the time it was first
-- seen. Returns {{stream, entry, fields, deliveries}, …}.
local prefix, worker, left = ARGV[1], ARGV[2], tonumber(ARGV[3])
local group, taken, held = 'workers', {}, {}
for place in string.gmatch(ARGV[6], '[^,]+') do held[place] = true end
local time, master = redis.call('TIME'), prefix .. 'master'
local now_ms, replid = time[1] * 1000 + math.floor(time[2] / 1000), string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local seen = redis.call('HMGET', master, 'id', 'since_ms')
if seen[1] ~= replid then
  seen[2] = string.format('%.0f', now_ms)
  redis.call('HSET', master, 'id', replid, 'since_ms', seen[2])
end
local settled = now_ms - tonumber(seen[2]) >= tonumber(ARGV[4])

local function take(stream, pending, deliveries)
  local entry = pending[1]
  local got = redis.call('XCLAIM', stream, group, worker, 0, entry, 'RETRYCOUNT', deliveries)
  if got[1] then
    taken[#taken + 1] = {stream, got[1][1], got[1][2], deliveries}
    left = left - 1
  end
end

for i = 7, #ARGV do
  local stream = ARGV[i]
  local summary = redis.pcall('XPENDING', stream, group)
  for _, owner in ipairs(not summary.err and summary[4] or {}) do
    local name = owner[1]
    local own = name == worker
    local gone = not own and settled and redis.call('EXISTS', prefix .. 'worker:' .. name) == 0
    if (own or gone) and left > 0 then
      for _, pending in ipairs(redis.call('XPENDING', stream, group, '-', '+', 1000, name)) do
        if left > 0 and gone then
          take(stream, pending, pending[4] + 1)
        elseif left > 0 and pending[3] >= tonumber(ARGV[5]) and not held[stream .. ' ' .. pending[1]] then
          take(stream, pending, pending[4])
        end
      end
    end
    if gone and redis.call('XPENDING', stream, group, '-', '+', 1, name)[1] == nil then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
    end
  end
end
return taken
