-- Replace what was reserved by what was used, and leave the event for the ledgers of all replicas.
-- KEYS: deadlines, one for each rule, stream, reservation.
-- ARGV: plan, actual and reserved costs, request id, whether a lost reservation counts, ms since admission, event.
-- → {0 | 2 where quotas wait for the row, stream entry}; {1} where there is nothing to settle

local known = redis.call('GET', KEYS[#KEYS])
local record = known and cmsgpack.unpack(known)
if record and record[1] ~= 'open' then
  return {record[1] == 'late' and 2 or 0, record[6]}
end
if not record and ARGV[4] == '0' then return {1} end

local now = clock()
local rules, actual, id = cmsgpack.unpack(ARGV[1]), costs_of(ARGV[2]), ARGV[3]
local admitted = record and record[2] or now - tonumber(ARGV[5])
local reserved = costs_of(ARGV[2], 25)
local late = {}

local function wait_for_row(i, rule)
  late[#late + 1] = i
  late[#late + 1] = (period(rule[4], admitted))
  late[#late + 1] = actual[rule[2]]
end

if record then
  for i, rule in ipairs(rules) do
    if rule[6] == 0 then
      if rule[1] == 'c' then
        redis.call('ZREM', KEYS[i + 1], id)
      elseif not counters[rule[1]].settle(KEYS[i + 1], rule, record[6][i], record[7][i], actual[rule[2]], now) then
        wait_for_row(i, rule)
      end
    end
  end
else
  record = {'', admitted}
  for i, rule in ipairs(rules) do
    if rule[6] == 0 and rule[1] == 'w' then
      local used, w = actual[rule[2]], window.look(KEYS[i + 1], rule, now)
      local expected = min(used, reserved[rule[2]])
      local bucket = window.take(w, rule, expected, now, admitted)
      if bucket then window.add(w, bucket, used - expected) end
    elseif rule[6] == 0 and rule[1] == 'q' then
      wait_for_row(i, rule)
    end
  end
  record[3], record[4] = figures(rules, look(rules, now), now)
  record[5] = {}
end

local entry = ''
if ARGV[6] ~= '' then
  local plan = #late > 0 and ARGV[1] or ''
  entry = redis.call('XADD', KEYS[#KEYS - 1], 'MAXLEN', '~', 100000, '*', 'id', id, 'event', ARGV[6], 'plan', plan)
end
local state = #late > 0 and 'late' or 'done'
local settled = {state, admitted, record[3], record[4], record[5], entry, late}
-- whoever is taken for dead and lives may be long in coming
redis.call('SET', KEYS[#KEYS], cmsgpack.pack(settled), 'PX', (#late > 0 or ARGV[4] == '0') and LATE or SETTLED)
redis.call('ZREM', KEYS[1], id)
return {#late > 0 and 2 or 0, entry}
