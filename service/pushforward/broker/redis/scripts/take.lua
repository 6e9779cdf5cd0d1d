#!lua flags=allow-oom
-- Lease chunks to a worker: those it has read already, then more while it has room.  The number of times that a
-- chunk was leased is its fence.
-- take(worker, room for interactive rows, for bulk rows, n, n × (stream, entry, id), streams in order)
-- → {{id, fence, ms until the deadline or '', body} …}
local worker = ARGV[1]
local room = {interactive = tonumber(ARGV[2]), bulk = tonumber(ARGV[3])}
local read = tonumber(ARGV[4])
local now = now_ms()
local taken = {}

local function lease(stream, entry, id)
  local job = p .. 'job:' .. id
  local known = redis.call('HMGET', job, 'entry', 'class', 'rows', 'deadline', 'api')
  local body = known[1] == entry and redis.call('GET', p .. 'in:' .. id)
  local left = ''
  if body and known[4] ~= '' then left = tonumber(known[4]) - now end
  if not body or (left ~= '' and left <= 0) or redis.call('EXISTS', p .. 'api:' .. known[5]) == 0 then
    -- cancelled, too late, or nobody waits for it any more
    remove(stream, entry)
    if known[1] == entry then forget(id) end
    return
  end
  local fence = redis.call('HINCRBY', job, 'attempts', 1)
  redis.call('HSET', job, 'owner', worker)
  room[known[2]] = room[known[2]] - tonumber(known[3])
  taken[#taken + 1] = {id, fence, tostring(left), body}
end

for i = 0, read - 1 do
  lease(ARGV[5 + 3 * i], ARGV[6 + 3 * i], ARGV[7 + 3 * i])
end
for i = 5 + 3 * read, #ARGV do
  local stream = ARGV[i]
  local class = string.find(stream, '^bulk:') and 'bulk' or 'interactive'
  local most = stream == 'alone' and 1 - read or 1000  -- one last attempt; no script may run for long
  while room[class] > 0 and most > 0 do
    most = most - 1
    local found = redis.pcall('XREADGROUP', 'GROUP', 'workers', worker, 'COUNT', 1, 'STREAMS', p .. stream, '>')
    if not found or found.err then break end
    local entry = found[1][2][1]
    lease(stream, entry[1], entry[2][2])
  end
end
return taken
