"""Stand-ins for what the operator talks to."""
