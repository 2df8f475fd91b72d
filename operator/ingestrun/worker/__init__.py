"""The built-in worker: fetch from files or HTTP, validate, publish Parquet. Sees `ingestrun.model` alone."""
