"""Settings of all unit tests."""

from __future__ import annotations

from hypothesis import settings

# No test is judged by its time, because the machine may be busy with others.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
