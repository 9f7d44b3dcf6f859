-- In which order waiting requests of a deployment and class are claimed. Every script begins with these functions.
-- `place` is <deployment>:<class>. server/fair_queue.py says what the order is; the two are tested against each other.
--   flows:<place>         sorted set: owner -> pass, microseconds of engine time; owners that wait
--   flow:<place>:<owner>  sorted set: entry -> when it is due, milliseconds
--   passes:<place>        hash: owner -> pass of those that wait no more while others do
--   looked:<place>        up to which entry claim.lua has looked for what came without a place
local function order_add(prefix, place, owner, entry, due_ms)
  local flows = prefix .. 'flows:' .. place
  local sequence = math.min(tonumber(string.match(entry, '-(%d+)$')), 4095) / 4096
  redis.call('ZADD', prefix .. 'flow:' .. place .. ':' .. owner, due_ms + sequence, entry)
  if not redis.call('ZSCORE', flows, owner) then
    local first = redis.call('ZRANGE', flows, 0, 0, 'WITHSCORES')[2] or 0
    local before = redis.call('HGET', prefix .. 'passes:' .. place, owner) or 0
    redis.call('ZADD', flows, math.max(tonumber(first), tonumber(before)), owner)
  end
end

local function order_leave(prefix, place, owner, entry)
  local flow, flows = prefix .. 'flow:' .. place .. ':' .. owner, prefix .. 'flows:' .. place
  if redis.call('ZREM', flow, entry) == 0 or redis.call('EXISTS', flow) == 1 then return end
  local pass = redis.call('ZSCORE', flows, owner)
  redis.call('ZREM', flows, owner)
  if redis.call('EXISTS', flows) == 0 then
    redis.call('DEL', prefix .. 'passes:' .. place)
  else
    redis.call('HSET', prefix .. 'passes:' .. place, owner, pass)
  end
end

-- The next entry and its owner; with slack_ms of the first 8 owners whose next is due sooner than that after it came,
-- and whose pass is at most a second ahead of the first. `left`: entries that are left to others; with it the first 8 of
-- each of these owners are looked at.
local function order_peek(prefix, place, slack_ms, left)
  local owners = redis.call('ZRANGE', prefix .. 'flows:' .. place, 0, (slack_ms or left) and 7 or 0, 'WITHSCORES')
  local lost = false
  for i = 1, #owners, 2 do
    if tonumber(owners[i + 1]) > tonumber(owners[2]) + 1000000 then break end
    local owner = owners[i]
    local head = redis.call('ZRANGE', prefix .. 'flow:' .. place .. ':' .. owner, 0, left and 7 or 0, 'WITHSCORES')
    if not head[1] then  -- its entries were lost, as by an eviction: that must not stop the claims of others
      lost = redis.call('ZREM', prefix .. 'flows:' .. place, owner) == 1
    end
    for j = 1, #head, 2 do
      local soon = not slack_ms or tonumber(head[j + 1]) - tonumber(string.match(head[j], '^%d+')) < slack_ms
      if soon and not (left and left[head[j]]) then return head[j], owner end
    end
  end
  if lost then return order_peek(prefix, place, slack_ms, left) end
end

local function order_charge(prefix, place, owner, cost_us, rows)
  redis.call('ZINCRBY', prefix .. 'flows:' .. place, math.max(cost_us, 1000 * rows), owner)
end

