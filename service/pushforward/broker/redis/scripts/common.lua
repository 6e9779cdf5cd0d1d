-- In front of every script.  KEYS[1] is what all keys begin with.
local p = KEYS[1]

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Have a stream, and its group.
local function make(stream)
  if redis.call('EXISTS', p .. stream) == 0 then
    redis.call('XGROUP', 'CREATE', p .. stream, 'workers', '0', 'MKSTREAM')
    redis.call('SADD', p .. 'streams', stream)
  end
end

-- Add a chunk to the end of a stream.
local function enqueue(id, stream)
  make(stream)
  local entry = redis.call('XADD', p .. stream, '*', 'id', id)
  redis.call('HSET', p .. 'job:' .. id, 'stream', stream, 'entry', entry, 'owner', '')
end

local function remove(stream, entry)
  redis.call('XACK', p .. stream, 'workers', entry)
  redis.call('XDEL', p .. stream, entry)
end

local function forget(id)
  redis.call('DEL', p .. 'job:' .. id, p .. 'in:' .. id)
end

-- Keep what nobody may answer, for a person to look at.
local function bury(id, worker, attempts, reason)
  redis.call('XADD', p .. 'dead', 'MAXLEN', '~', 100, '*', 'id', id, 'reason', reason, 'worker', worker,
    'attempts', attempts, 'body', redis.call('GET', p .. 'in:' .. id) or '')
end

-- Tell the API process that waits for a chunk, if it is still there; it takes the stream along when it goes.
local function reply(api, id, word, value)
  local left = redis.call('PTTL', p .. 'api:' .. api)
  if left > 0 then
    redis.call('XADD', p .. 'reply:' .. api, '*', 'id', id, word, value)
    redis.call('PEXPIRE', p .. 'reply:' .. api, left)
  end
end
