#!lua flags=allow-oom
-- A worker leaves in order: what it holds is queued again, and does not count as an attempt.
-- release(worker, (id, fence) …)
local worker = ARGV[1]
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  local job = p .. 'job:' .. id
  local known = redis.call('HMGET', job, 'owner', 'attempts', 'stream', 'entry')
  if known[1] == worker and known[2] == ARGV[i + 1] then
    remove(known[3], known[4])
    enqueue(id, known[3] == 'alone' and 'alone' or 'again')
    redis.call('HSET', job, 'attempts', known[2] - 1)
  end
end
redis.call('DEL', p .. 'worker:' .. worker)
