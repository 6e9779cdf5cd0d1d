#!lua
-- Have streams that nobody has written to yet, so that they can be waited for.
-- make(stream …)
for _, stream in ipairs(ARGV) do make(stream) end
