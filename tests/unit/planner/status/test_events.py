"""Events as the API server accepts them."""

from __future__ import annotations

import pytest

from ingestrun.planner.status.events import NOTE_BYTES, normal, warning


@pytest.mark.parametrize("note", ["x" * 5000, "ü" * 1000, "日" * 800, "short"])
def test_a_note_has_at_most_the_bytes_that_the_api_server_accepts(note: str) -> None:
    for event in (normal("R", note, action="A"), warning("R", note, action="A")):
        assert len(event.note.encode()) <= NOTE_BYTES
        assert event.note.rstrip("…") == note[: len(event.note.rstrip("…"))]
        assert len(event.note) >= min(len(note), 300)
