"""A worker of a run's pool: claims batches from the operator and takes each through all its stages."""
