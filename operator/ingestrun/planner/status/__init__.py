"""The status of a run: its conditions, its bytes, and the Events that a change of it deserves."""
