"""The shell around the planner: watches, the keyed queue, effects, settings, logs, main."""
