#!lua flags=allow-oom
-- Have all workers load or unload a version, now and when they come.
-- order(version, "load" or "unload")
redis.call('HSET', p .. 'orders', ARGV[1], ARGV[2] .. ':' .. redis.call('INCR', p .. 'orders-given'))
