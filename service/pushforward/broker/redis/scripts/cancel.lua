#!lua flags=allow-oom
-- Forget chunks that nobody waits for, and nudge the workers that hold them.
-- cancel(id …)
for _, id in ipairs(ARGV) do
  local known = redis.call('HMGET', p .. 'job:' .. id, 'owner', 'stream', 'entry')
  if known[2] then
    remove(known[2], known[3])
    forget(id)
    if known[1] ~= '' then redis.call('PUBLISH', p .. 'cancelled:' .. known[1], id) end
  end
end
