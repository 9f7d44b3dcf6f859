-- The answer of a request if it has ended; otherwise one more gateway will be told when it does.
-- ARGV: prefix id gateway
-- Returns the result, '' while unfinished, nil for a request that is not known.
local req = ARGV[1] .. 'req:' .. ARGV[2]
local f = redis.call('HMGET', req, 'status', 'result', 'reply_to')
if not f[1] then return nil end
if f[2] then return f[2] end
for gateway in string.gmatch(f[3], '[^,]+') do
  if gateway == ARGV[3] then return '' end
end
redis.call('HSET', req, 'reply_to', f[3] .. ',' .. ARGV[3])
return ''
