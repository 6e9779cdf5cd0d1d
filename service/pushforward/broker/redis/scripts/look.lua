#!lua flags=no-writes
-- What the workers say of themselves.
-- look() → {what a worker says … }, orders
local said = {}
for _, worker in ipairs(redis.call('SMEMBERS', p .. 'workers')) do
  local words = redis.call('GET', p .. 'worker:' .. worker)
  if words then said[#said + 1] = words end
end
return {said, redis.call('HGETALL', p .. 'orders')}
