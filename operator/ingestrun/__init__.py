"""The IngestRun operator: batch ingestion on Kubernetes, with a cancel that can be trusted."""
