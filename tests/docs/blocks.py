"""The fenced blocks of the documents, and what is said about each in a comment above it.

`<!-- docs-test: ... -->` above a block is for the test alone, readers don't see it:

- `not run, REASON`: the block is left out; the reason is listed by the test.
- `dry run`: its `kubectl apply`, `create` and `patch` change nothing.
- `first` and commands, in lines of their own: what has to be there for the block, run before it. `shell.sh` beside this
  file has what such scripts share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE: Final = re.compile(r"^(?P<indent> *)```(?P<language>\w*)$")
COMMENT: Final = re.compile(r"<!-- docs-test: (.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    directives: tuple[str, ...] = field(default=())

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Return the reason why it is not run; None if it is run."""
        return next((d.removeprefix("not run, ") for d in self.directives if d.startswith("not run, ")), None)

    @property
    def dry_run(self) -> bool:
        return "dry run" in self.directives

    @property
    def first(self) -> list[str]:
        """The scripts to run before it."""
        return [d.removeprefix("first").strip() for d in self.directives if d.startswith("first")]

    @cached_property
    def steps(self) -> list[tuple[str, str]]:
        """The commands with what they print: behind `$ `, or the whole block as a script that is only to succeed."""
        if not self.text.startswith("$ "):
            return [(self.text, "")]
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [(command, output) for command, _, output in (part.partition("\n") for part in parts)]

    @cached_property
    def body(self) -> Any:
        """Return the objects in a block of YAML or JSON."""
        return yaml.safe_load(self.text)


def blocks(page: Path) -> Iterator[Block]:
    """Yield a page's blocks in order."""
    lines = page.read_text().splitlines()
    number, before = 0, 0
    while number < len(lines):
        begin = FENCE.match(lines[number])
        if begin is None:
            number += 1
            continue
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        indent = len(begin["indent"])
        yield Block(
            page=page,
            line=number + 1,
            language=begin["language"],
            text="\n".join(line[indent:] for line in lines[number + 1 : end]) + "\n",
            directives=tuple(COMMENT.findall("\n".join(above(lines[before:number])))),
        )
        number = before = end + 1


def above(lines: list[str]) -> list[str]:
    """Return the comments that stand right above a block, with nothing but empty lines in between."""
    rest = [line.strip() for line in lines]
    while rest and not rest[-1]:
        rest.pop()
    kept: list[str] = []
    while rest and rest[-1].endswith("-->"):
        begin = max((n for n, line in enumerate(rest) if line.startswith("<!--")), default=len(rest))
        kept, rest = rest[begin:] + kept, rest[:begin]
    return kept
