#!lua flags=allow-oom
-- Compare what an API process waits for with what is there.  A queued chunk whose version no worker reads any
-- more goes to the stream that all read.
-- audit(n, n × version that workers read, id …) → ids that are not known
local count = tonumber(ARGV[1])
local read = {any = true}
for i = 2, count + 1 do read[ARGV[i]] = true end
local missing = {}
for i = count + 2, #ARGV do
  local id = ARGV[i]
  local job = p .. 'job:' .. id
  local known = redis.call('HMGET', job, 'owner', 'stream', 'entry', 'class')
  if not known[2] then
    missing[#missing + 1] = id
  elseif known[1] == '' then
    local version = string.match(known[2], '^%a+:(.+)$')
    if version and not read[version] then
      remove(known[2], known[3])
      enqueue(id, known[4] .. ':any')
    end
  end
end
return missing
