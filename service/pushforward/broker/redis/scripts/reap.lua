#!lua flags=allow-oom
-- Take chunks back whose worker has let its lease run out: they are queued again, the last time alone, or they are
-- spent.  Forget workers that have gone.  One worker does it for all.
-- reap(worker, lease in ms, attempts) → {queued again, quarantined, spent}
local worker, lease, attempts = ARGV[1], ARGV[2], tonumber(ARGV[3])
local again, alone, spent = 0, 0, 0
if not redis.call('SET', p .. 'reaper', worker, 'NX', 'PX', 500) then return {0, 0, 0} end

for _, stream in ipairs(redis.call('SMEMBERS', p .. 'streams')) do
  local found = redis.pcall('XAUTOCLAIM', p .. stream, 'workers', worker, lease, '0', 'COUNT', 100)
  for _, entry in ipairs(found[2] or {}) do
    local id = entry[2][2]
    local job = p .. 'job:' .. id
    local known = redis.call('HMGET', job, 'attempts', 'api', 'entry')
    remove(stream, entry[1])
    if known[3] == entry[1] then
      local tried = tonumber(known[1])
      if tried >= attempts then
        spent = spent + 1
        bury(id, redis.call('HGET', job, 'owner'), tried, 'workers were lost with it')
        forget(id)
        reply(known[2], id, 'spent', tried)
      elseif tried == attempts - 1 then
        alone = alone + 1
        enqueue(id, 'alone')
      else
        again = again + 1
        enqueue(id, 'again')
      end
    end
  end
end

local read = {}
for _, worker in ipairs(redis.call('SMEMBERS', p .. 'workers')) do
  local said = redis.call('GET', p .. 'worker:' .. worker)
  if said then
    for _, version in ipairs(cmsgpack.unpack(said)[3]) do read[version] = true end  -- see words.py
  else
    redis.call('SREM', p .. 'workers', worker)
  end
end
-- One stream at a time: workers that have gone are struck off, and it goes when it is empty and nobody reads it.
local stream = redis.call('SRANDMEMBER', p .. 'streams')
if stream then
  for _, of in ipairs(redis.pcall('XINFO', 'CONSUMERS', p .. stream, 'workers')) do
    local name, pending = of[2], of[4]
    if pending == 0 and redis.call('EXISTS', p .. 'worker:' .. name) == 0 then
      redis.call('XGROUP', 'DELCONSUMER', p .. stream, 'workers', name)
    end
  end
  local version = string.match(stream, '^%a+:(.+)$')
  if version and version ~= 'any' and not read[version] and redis.call('XLEN', p .. stream) == 0 then
    redis.call('DEL', p .. stream)
    redis.call('SREM', p .. 'streams', stream)
  end
end
return {again, alone, spent}
