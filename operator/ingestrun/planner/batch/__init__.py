"""One batch: its attempts, where it stands, what a failure leads to, and how it is counted."""
