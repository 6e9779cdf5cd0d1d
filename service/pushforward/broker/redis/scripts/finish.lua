#!lua flags=allow-oom
-- Settle a chunk, if it is still this worker's, and send its answer to whoever waits for it.
-- finish(worker, id, fence, body, why it goes to the dead letters or '') → whether it counted
local worker, id = ARGV[1], ARGV[2]
local job = p .. 'job:' .. id
local known = redis.call('HMGET', job, 'owner', 'attempts', 'stream', 'entry', 'api')
if known[1] ~= worker or known[2] ~= ARGV[3] then return 0 end
remove(known[3], known[4])
if ARGV[5] ~= '' then bury(id, worker, known[2], ARGV[5]) end
forget(id)
reply(known[5], id, 'body', ARGV[4])
return 1
