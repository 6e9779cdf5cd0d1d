#!lua flags=allow-oom
-- Have all workers load or unload a version, now and when they come.
-- order(version, "load" or "unload")
redis.call('HSET', p .. 'orders', ARGV[1], string.format('%s:%d', ARGV[2], now_ms()))
