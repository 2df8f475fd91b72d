"""The status of a run: its conditions, its bytes, and the Events about its changes."""
