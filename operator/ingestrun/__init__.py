"""The IngestRun operator: batch ingestion on Kubernetes, with a cancel that can be trusted."""

__version__ = "0.1.0"
"""The version of package, images and manifests. tests/unit/test_manifests.py compares the manifests with it."""
