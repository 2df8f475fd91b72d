"""The container images' build, with or without a registry: `python3 -m dev.images --help`."""
