"""The life of a run: schedule, backpressure, completion, cancel, drain and resume."""
