-- Reserve for all rules, or for none and take nothing.
-- KEYS: deadlines, one for each rule, reservation. ARGV: plan, costs, intent, request id, views.
-- → {0, now, remaining, reset, shadowed} | {1, … , denied, wait} | {2, now, rule, period, …} for quotas to be seeded
-- | {3, …} as 0, which was the answer before

local known = redis.call('GET', KEYS[#KEYS])
if known then
  local record = cmsgpack.unpack(known)
  return {3, record[2], record[3], record[4], record[5]}
end

local now = clock()
local rules, costs = cmsgpack.unpack(ARGV[1]), costs_of(ARGV[2])
local seen = look(rules, now, ARGV[5])

local unknown = {2, now}
for i, rule in ipairs(rules) do
  if seen[i].unknown then
    unknown[#unknown + 1] = i - 1
    unknown[#unknown + 1] = seen[i].unknown
  end
end
if #unknown > 2 then return unknown end

local denied, longest, shadowed = nil, 0, {}
for i, rule in ipairs(rules) do
  local wait = counters[rule[1]].wait(seen[i], costs[rule[2]], rule[3], now)
  if wait ~= 0 then
    if rule[5] == 1 then
      shadowed[#shadowed + 1] = i - 1
    elseif not denied or longest ~= NEVER and (wait == NEVER or wait > longest) then
      denied, longest = i - 1, wait
    end
  end
end
if denied then
  local remaining, reset = figures(rules, seen, now)
  return {1, now, remaining, reset, shadowed, denied, longest}
end
return hold(rules, seen, shadowed, now, now, ARGV[4], costs, 0)
