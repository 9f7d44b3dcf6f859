-- A named lease with a fencing number. The number never falls, even if the server lost everything: it is
-- at least the milliseconds of the server's clock.
-- ARGV: prefix 'acquire'|'renew'|'release' name owner ttl_ms
-- acquire returns the number, or nil while another owner has it; the others 1, or 0 if it is not this owner's.
local key, counter = ARGV[1] .. 'lease:' .. ARGV[3], ARGV[1] .. 'fence:' .. ARGV[3]
local held = redis.call('HMGET', key, 'owner', 'fence')
local mine = held[1] == ARGV[4]

if ARGV[2] == 'release' then
  if mine then redis.call('DEL', key) end
  return mine and 1 or 0
end
if mine then
  redis.call('PEXPIRE', key, ARGV[5])
  return ARGV[2] == 'renew' and 1 or tonumber(held[2])
end
if ARGV[2] == 'renew' then return 0 end
if held[1] then return nil end

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local fence = math.max(tonumber(redis.call('GET', counter) or 0) + 1, now_ms)
local written = string.format('%.0f', fence)
redis.call('SET', counter, written)
redis.call('HSET', key, 'owner', ARGV[4], 'fence', written)
redis.call('PEXPIRE', key, ARGV[5])
return fence
