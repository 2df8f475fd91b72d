"""The planner: pure functions from a snapshot of a run to what is to be done. It knows no client and no clock."""
