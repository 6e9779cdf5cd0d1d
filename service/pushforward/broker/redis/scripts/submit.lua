#!lua
-- Queue a chunk, unless it is there already.
-- submit(id, stream, class, rows, api, ms until the deadline or '', ms to keep, body) → whether it is new
local id = ARGV[1]
local job = p .. 'job:' .. id
if redis.call('EXISTS', job) == 1 then return 0 end
local deadline = ''
if ARGV[6] ~= '' then deadline = string.format('%d', now_ms() + tonumber(ARGV[6])) end
redis.call('SET', p .. 'in:' .. id, ARGV[8], 'PX', ARGV[7])
redis.call('HSET', job, 'class', ARGV[3], 'rows', ARGV[4], 'api', ARGV[5], 'deadline', deadline, 'attempts', 0)
redis.call('PEXPIRE', job, ARGV[7])
enqueue(id, ARGV[2])
return 1
