"""The resource, the container contract and index ranges: plain values, no I/O. It imports nothing else of ours."""
