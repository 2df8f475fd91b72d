"""What the controller keeps in memory; a restart may lose all of it."""
