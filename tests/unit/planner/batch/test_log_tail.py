"""A failed container's last words: whatever it prints, what is shown is bounded and harmless."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.size_budget import LOG_BYTES
from ingestrun.planner.batch.failure_policy import last_line, last_lines, strip_control


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        (None, None),
        ("", None),
        ("\n \n", None),
        ('{"v":"v1","outcome":"failed","message":"said already"}', None),
        ("one\ntwo\n", "one\ntwo"),
        ("  indented\r\n\ttabbed\r\n", "  indented\n tabbed"),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07bell\x07\x00", "red bell"),
        ("safe\u202etxt.exe\u2066", "safetxt.exe"),
    ],
)
def test_what_is_kept(printed: str | None, kept: str | None) -> None:
    assert last_lines(printed) == kept


def test_a_long_log_keeps_whole_lines_of_its_end() -> None:
    text = "\n".join(f"line {n}" for n in range(200))
    kept = last_lines(text)
    assert kept is not None
    assert kept.endswith("line 198\nline 199")
    assert all(line.startswith("line ") for line in kept.split("\n"))
    assert LOG_BYTES - 20 < size(kept) <= LOG_BYTES


def test_one_long_line_keeps_its_end() -> None:
    kept = last_lines("x" * 2000 + " the cause")
    assert kept is not None
    assert kept.startswith("…x")
    assert kept.endswith(" the cause")


def size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode()) - 2


@given(st.text(max_size=3000) | st.text(alphabet='日本"\\\n\x1b[', max_size=3000))
def test_never_too_long_and_no_control_characters(printed: str) -> None:
    kept = last_lines(printed)
    assert kept is None or 0 < size(kept) <= LOG_BYTES
    assert not [char for char in kept or "" if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs")]
    assert strip_control(strip_control(printed)) == strip_control(printed)
    line = last_line(printed, chars=50)
    assert len(line) <= 50
    assert "\n" not in line
