"""Tools for developing the project: the cluster, the images, the demo, the benchmarks. No part of the package."""
