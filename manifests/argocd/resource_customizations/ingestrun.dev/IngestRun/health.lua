-- The health of an IngestRun for Argo CD.
local hs = {status = "Progressing", message = "waiting for the operator"}
if obj.metadata.deletionTimestamp ~= nil then
  hs.message = "Pending deletion"
  return hs
end
local status = obj.status
if status == nil or status.phase == nil then
  return hs
end

local succeeded = {}
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == "Succeeded" then
    succeeded = condition
  end
end

-- A run never leaves these phases, so they hold whatever has been changed since.
local ended = {Succeeded = "Healthy", Failed = "Degraded", Cancelled = "Degraded"}
if ended[status.phase] == nil and status.observedGeneration ~= obj.metadata.generation then
  return hs
end

hs.message = status.phase
if succeeded.message ~= nil and succeeded.message ~= "" then
  hs.message = succeeded.message
end
hs.status = ended[status.phase] or hs.status
if status.phase == "Suspended" then
  hs.status = "Suspended"
end
return hs
