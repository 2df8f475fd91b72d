"""The resource, the container contract and index ranges: plain values, no I/O. It imports no other IngestRun code."""
