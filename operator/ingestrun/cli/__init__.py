"""The kubectl plugin `kubectl-ingestrun`. It imports `ingestrun.model` alone, and of that what needs no pydantic.

`kubectl ingestrun` starts this program anew for each command, so what is imported is waited for: a command imports its
own module only when it is run.
"""
