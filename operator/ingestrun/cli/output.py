"""Output: tables, boxes, bars, JSON and YAML. Only a terminal gets colour and bars."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, TextIO

BOX_WIDTH: Final = 60
BAR_WIDTH: Final = 24
_COLUMN_GAP: Final = 3
_PHASE_STYLES: Final = {"Running": "36", "Succeeded": "32", "Failed": "31", "Cancelled": "33", "Suspended": "35"}


class Output:
    """The user's terminal, or the file or program in its place."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr
        self.fancy = self._out.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ

    def write(self, text: str) -> None:
        """Print lines."""
        self._out.write(text + "\n")
        self._out.flush()

    def complain(self, text: str) -> None:
        """Print an error or a hint, which is no result."""
        self._out.flush()
        self._err.write(text + "\n")
        self._err.flush()

    def data(self, value: Any, form: str) -> None:
        """Print a value as `json` or `yaml`."""
        if form == "yaml":
            import yaml

            text = yaml.dump(value, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)
            self.write(text.rstrip("\n"))
        else:
            self.write(json.dumps(value, indent=4, ensure_ascii=False))

    def redraw(self, text: str, *, over: int) -> int:
        """Print lines in place of the last `over` ones, and return how many they are.

        They are cut to the terminal, because a line that wraps would not be drawn over.
        """
        columns, rows = shutil.get_terminal_size()
        lines = [line[: columns - 1] for line in text.splitlines()[: rows - 1]]
        self.write((f"\x1b[{over}A\x1b[J" if over else "") + "\n".join(lines))
        return len(lines)

    def phase(self, phase: str) -> str:
        """Return a phase, coloured where there is colour."""
        return self._styled(phase, _PHASE_STYLES.get(phase))

    def strong(self, text: str) -> str:
        """Return a text that stands out."""
        return self._styled(text, "1")

    def _styled(self, text: str, style: str | None) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.fancy and style else text

    def bar(self, done: float) -> str:
        """Return a bar for a share from 0 to 1, with a blank after it; nothing where there are no bars."""
        if not self.fancy:
            return ""
        full = round(BAR_WIDTH * min(1.0, max(0.0, done)))
        return f"[{'#' * full}{'-' * (BAR_WIDTH - full)}] "


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, widths: list[int] | None = None) -> str:
    """Return a table as kubectl prints it. `widths`, where given, is kept: it may grow, and never shrinks.

    A cell with nothing in it is `<none>`, as kubectl has it, and no cell has a line break.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    lines = [list(head), *cells] if head else cells
    kept = widths if widths is not None else []
    kept += [0] * (max(map(len, lines), default=0) - len(kept))
    for line in lines:
        for column, cell in enumerate(line):
            kept[column] = max(kept[column], len(cell))
    gap = " " * _COLUMN_GAP
    return "\n".join(gap.join(f"{cell:<{kept[at]}}" for at, cell in enumerate(line)).rstrip() for line in lines)


def _cell(text: str) -> str:
    return " ".join(part.strip() if at else part for at, part in enumerate(clean(text).splitlines())) or "<none>"


def clean(text: str) -> str:
    """Return a text without what would steer a terminal: others have written the reasons and messages of runs."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


def box(lines: Iterable[tuple[str, str]], *, items: tuple[str, Sequence[str]] | None = None) -> str:
    """Return a summary between two rules: names with values, then a list under a title."""
    parts = [(name, value) for name, value in lines if value]
    width = max((len(name) for name, _ in parts), default=0) + 1
    rule = "=" * BOX_WIDTH
    body = [f"{f'{name}:':<{width}} {clean(value)}" for name, value in parts]
    if items is not None and items[1]:
        body += [f"{items[0]}:", *(f"  - {item}" for item in items[1])]
    return "\n".join([rule, *body, rule])


def count(number: int) -> str:
    """Write a number with commas between thousands."""
    return f"{number:,}"
