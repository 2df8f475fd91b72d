"""The planner, the failure policy and the Job manifests: pure functions over plain values.

Nothing here knows a client, a clock or kopf; imports `ingestrun.model` alone.
"""
