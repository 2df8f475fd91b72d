"""The documents wrap at 120 characters, and the paths, tests and links in them exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).parents[2]
PACKAGE: Final = REPOSITORY / "operator" / "ingestrun"
LINE: Final = 120

DOCUMENTS: Final = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(path for folder in ("docs", "dev", "manifests") for path in (REPOSITORY / folder).rglob("*.md")),
    ]
)

NOT_WRAPPED: Final = {"docs/reference.md"}
"""The former is being rewritten; the latter is generated, a rule of the CRD a line."""

FOLDERS: Final = (
    "operator", "planner", "controller", "kube", "model", "worker", "tests", "dev", "docs", "crds", "manifests",
)  # fmt: skip
PATH: Final = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*")
FENCED: Final = re.compile(r"^\s*```.*?^\s*```", re.MULTILINE | re.DOTALL)
CODE: Final = re.compile(r"`([^`]+)`")
TEST: Final = re.compile(r"\btest_\w+")
LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LINK_ALONE: Final = re.compile(r"\s*(?:[-*] )?!?\[[^\]]*\]\([^)]*\)[.,]?")
BULLET: Final = re.compile(r"(\s*)(?:[-*]|\d+\.) ")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a document that are neither code, table, heading nor comment."""
    fence: str | None = None
    code_indent = 4
    after_blank = True
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if fence is not None:
            fence = None if bare == fence else fence
        elif bare.startswith("```"):
            fence = "```"
        elif not bare:
            after_blank = True
        else:
            indent = len(line) - len(line.lstrip())
            in_code = indent >= code_indent and (after_blank or in_code)
            after_blank = False
            if in_code:
                continue
            if bullet := BULLET.match(line):
                code_indent = len(bullet[1]) + 6
            elif not indent:
                code_indent = 4
            if not bare.startswith(("|", "#", "<!--")):
                yield number, line


@each_document
def test_prose_wraps(path: Path) -> None:
    if str(path.relative_to(REPOSITORY)) in NOT_WRAPPED:
        assert path.exists()
        return
    long = [
        f"{path.name}:{number}: {len(line)} characters"
        for number, line in prose(path.read_text())
        if len(line) > LINE and not LINK_ALONE.fullmatch(line)
    ]
    assert not long


def test_code_is_not_prose() -> None:
    text = "one\n\n    code\n\n- two\n  three\n\n      code\n\n```\ncode\n```\n| cell |\n# head\nfour\n"
    assert [line for _, line in prose(text)] == ["one", "- two", "  three", "four"]


def code_spans(path: Path) -> list[str]:
    """Return what stands in backticks in a document's prose and tables."""
    return CODE.findall(FENCED.sub("", path.read_text()))


@each_document
def test_paths_exist(path: Path) -> None:
    named = {found for code in code_spans(path) for found in PATH.findall(code)}
    assert not [name for name in sorted(named) if not exists(name, beside=path.parent)]


def exists(name: str, *, beside: Path) -> bool:
    """Find a path from the root, from the operator's package, or from the document's folder."""
    return any((base / name).exists() for base in (REPOSITORY, PACKAGE, beside))


@each_document
def test_tests_exist(path: Path) -> None:
    named = {found for code in code_spans(path) for found in TEST.findall(code)}
    # A name that ends in an underscore is cut short in the document.
    assert not [
        name
        for name in sorted(named)
        if not any(known == name or (name.endswith("_") and known.startswith(name)) for known in known_tests())
    ]


@cache
def known_tests() -> frozenset[str]:
    """Return the names of all test functions and test modules."""
    modules = list((REPOSITORY / "tests").rglob("*.py"))
    functions = (re.findall(r"def (test_\w+)", module.read_text()) for module in modules)
    return frozenset([module.stem for module in modules] + [name for names in functions for name in names])


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in LINK.findall(path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def test_functions_of_the_architecture_exist() -> None:
    """`Class.method` and `package.module.function`, as the ways of a cancel and of a batch name them."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    ways = text[text.index("## The way of a cancel") : text.index("## One pass")]
    named = set(re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)+)`", ways))
    assert len(named) > 20
    assert sorted(named - known_functions()) == []


def known_functions() -> frozenset[str]:
    """Return each function of the package, by its module, and each method, by its class."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(f"{module}.{node.name}")
            elif isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{it.name}" for it in node.body if hasattr(it, "name")}
    return frozenset(found)
