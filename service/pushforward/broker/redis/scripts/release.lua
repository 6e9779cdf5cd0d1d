#!lua flags=allow-oom
-- A worker leaves in order: what it has read, and does not keep to the end, is queued again and does not count as
-- an attempt.
-- release(worker, ids that it keeps …)
local worker, kept = ARGV[1], {}
for i = 2, #ARGV do kept[ARGV[i]] = true end
for _, stream in ipairs(redis.call('SMEMBERS', p .. 'streams')) do
  for _, pending in ipairs(redis.pcall('XPENDING', p .. stream, 'workers', '-', '+', 100000, worker)) do
    local entry = redis.call('XRANGE', p .. stream, pending[1], pending[1])[1]
    local id = entry and entry[2][2]
    if not id or not kept[id] then
      local known = id and redis.call('HMGET', p .. 'job:' .. id, 'entry', 'owner') or {}
      remove(stream, pending[1])
      if known[1] == pending[1] then
        if known[2] == worker then redis.call('HINCRBY', p .. 'job:' .. id, 'attempts', -1) end
        enqueue(id, stream == 'alone' and 'alone' or 'again')
      end
    end
  end
  if #ARGV == 1 then redis.pcall('XGROUP', 'DELCONSUMER', p .. stream, 'workers', worker) end
end
if #ARGV == 1 then
  redis.call('DEL', p .. 'worker:' .. worker)
  redis.call('SREM', p .. 'workers', worker)
end
