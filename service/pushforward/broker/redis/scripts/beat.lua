#!lua flags=allow-oom
-- A worker lives, and has made progress with what it holds.
-- beat(worker, life in ms, what it says of itself, whether it would take a chunk: 1 or 0, (id, fence) …)
-- → {ids it holds no longer, orders, whether it is to empty itself for a quarantined chunk}
local worker = ARGV[1]
redis.call('SADD', p .. 'workers', worker)
redis.call('SET', p .. 'worker:' .. worker, ARGV[3], 'PX', ARGV[2])
local lost = {}
for i = 5, #ARGV, 2 do
  local id = ARGV[i]
  local known = redis.call('HMGET', p .. 'job:' .. id, 'owner', 'attempts', 'stream', 'entry')
  if known[1] == worker and known[2] == ARGV[i + 1] then
    redis.call('XCLAIM', p .. known[3], 'workers', worker, 0, known[4], 'JUSTID')
  else
    lost[#lost + 1] = id
  end
end
local alone = 0
if ARGV[4] == '1' and redis.call('XLEN', p .. 'alone') > 0 then
  redis.call('SET', p .. 'alone-taker', worker, 'NX', 'PX', ARGV[2])
  if redis.call('GET', p .. 'alone-taker') == worker then
    redis.call('PEXPIRE', p .. 'alone-taker', ARGV[2])
    alone = 1
  end
end
return {lost, redis.call('HGETALL', p .. 'orders'), alone}
