"""Benchmarks on the development cluster. They print measurements and fail only if a run ends wrongly."""
