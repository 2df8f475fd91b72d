"""The controller's state in memory; a restart may lose all of it."""
