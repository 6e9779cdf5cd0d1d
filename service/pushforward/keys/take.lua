-- Counts rows for a key, all or nothing: an empty list, or which limit was met, how many rows it has left, and in how
-- many seconds there will be enough.
-- KEYS: tokens, rows in flight.  ARGV: rows, rows per second (0: any), burst, rows in flight (0: any), member, timeout.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local rows, rate, burst, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

if most > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  local held = 0
  for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    held = held + tonumber(string.match(member, '^%d+'))
  end
  if held + rows > most then
    return {'rows_in_flight', tostring(most - held), '1'}
  end
end

if rate > 0 then
  local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
  local tokens = burst
  if kept[1] then
    tokens = math.min(burst, kept[1] + math.max(0, now - kept[2]) * rate)
  end
  if tokens < rows then
    return {'rows_per_second', string.format('%.6f', tokens), string.format('%.6f', (rows - tokens) / rate)}
  end
  redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens - rows), 'at', string.format('%.6f', now))
  redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 1)
end

if most > 0 then
  redis.call('ZADD', KEYS[2], string.format('%.6f', now + ARGV[6]), ARGV[5])
  if redis.call('TTL', KEYS[2]) < ARGV[6] + 1 then
    redis.call('EXPIRE', KEYS[2], math.ceil(ARGV[6]) + 1)
  end
end
return {}
