"""Benchmarks: they print what the audit log says, and judge no time."""
