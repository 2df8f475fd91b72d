"""Builds the container images, with or without a registry: `python3 -m dev.images --help`."""
