-- Gives streams the group through which they are read. Nothing in one without it has been claimed.
-- ARGV: prefix, then streams
for i = 2, #ARGV do redis.pcall('XGROUP', 'CREATE', ARGV[i], 'workers', '0', 'MKSTREAM') end
