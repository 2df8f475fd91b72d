"""The resource, the container contract and index ranges: plain values, no I/O. Imports nothing of ours."""
