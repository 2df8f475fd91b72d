"""The built-in worker: fetch from files or HTTP, validate, publish Parquet. It imports `ingestrun.model` alone."""
