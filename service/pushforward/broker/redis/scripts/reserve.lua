#!lua flags=allow-oom
-- Keep rows and bytes within what all API processes together may hold.  Each of them says what it holds in
-- whole numbers, never by how much that has changed, so that nothing drifts when a message is lost or Redis is.
-- reserve(api, rows held, bytes held, rows asked, bytes asked, most rows, most bytes, rows/s, bytes/s, life in ms)
-- → {granted, rows of all, bytes of all, rows/s of all, bytes/s of all}
local api = ARGV[1]
local held = {tonumber(ARGV[2]), tonumber(ARGV[3])}
local asked = {tonumber(ARGV[4]), tonumber(ARGV[5])}
local sum = {held[1], held[2], tonumber(ARGV[8]), tonumber(ARGV[9])}
for _, other in ipairs(redis.call('SMEMBERS', p .. 'apis')) do
  if other ~= api then
    local its = redis.call('HMGET', p .. 'api:' .. other, 'rows', 'bytes', 'rows/s', 'bytes/s')
    if its[1] then
      for i = 1, 4 do sum[i] = sum[i] + tonumber(its[i]) end
    else
      redis.call('SREM', p .. 'apis', other)
    end
  end
end
local granted = 0
if sum[1] + asked[1] <= tonumber(ARGV[6]) and sum[2] + asked[2] <= tonumber(ARGV[7]) then
  granted = 1
  for i = 1, 2 do
    held[i] = held[i] + asked[i]
    sum[i] = sum[i] + asked[i]
  end
end
redis.call('SADD', p .. 'apis', api)
redis.call('HSET', p .. 'api:' .. api,
  'rows', held[1], 'bytes', held[2], 'rows/s', ARGV[8], 'bytes/s', ARGV[9])
redis.call('PEXPIRE', p .. 'api:' .. api, ARGV[10])
redis.call('PEXPIRE', p .. 'reply:' .. api, ARGV[10])
return {granted, sum[1], sum[2], tostring(sum[3]), tostring(sum[4])}
