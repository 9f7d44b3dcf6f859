-- The versions of a deployment that may be published. The empty member keeps the set there when it is empty.
-- ARGV: prefix 'set' deployment versions…    -> 1
-- ARGV: prefix 'retire' deployment version   -> 1 if the version is gone, 0 while an unfinished request pins it
local servable, pins = ARGV[1] .. 'servable:' .. ARGV[3], ARGV[1] .. 'pins:' .. ARGV[3]
if ARGV[2] == 'retire' then
  if tonumber(redis.call('HGET', pins, ARGV[4]) or 0) > 0 then return 0 end
  redis.call('SREM', servable, ARGV[4])
  return 1
end
redis.call('DEL', servable)
redis.call('SADD', servable, '')
for i = 4, #ARGV do redis.call('SADD', servable, ARGV[i]) end
return 1
