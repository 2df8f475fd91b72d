"""Triggers of the controller: watch events, the work queue and the resync."""
