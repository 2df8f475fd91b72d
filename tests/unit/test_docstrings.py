"""The first words of docstrings: the verb or the noun that a reader looks for, and no noun clause."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "operator" / "ingestrun"

UNWANTED = frozenset(
    ["What", "Whether", "That", "Where", "Why", "How", "So", "Those", "Which", "Who", "None", "As", "By", "Of"]
)
"""First words of a noun clause or a fragment, which name no subject."""


def unwanted_docstrings(source: str) -> list[tuple[int, str]]:
    """Return the line and the first line of each docstring that begins with an unwanted word."""
    return [
        (node.lineno, text.splitlines()[0])
        for node, text in _docstrings(ast.parse(source))
        if text.split(maxsplit=1)[0].rstrip(".,:;") in UNWANTED
    ]


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, str]]:
    """Yield the docstrings of modules, classes, functions, and attributes (a string after an assignment)."""
    for owner in ast.walk(tree):
        body = getattr(owner, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for index, node in enumerate(body):
            follows = index > 0 and isinstance(body[index - 1], ast.Assign | ast.AnnAssign)
            if not (follows or (documented and index == 0)):
                continue
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))) if text.strip():
                    yield node, text.strip()


def _sources() -> list[str]:
    """Return the paths of the checked files, relative to the package."""
    paths = (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return sorted(paths)


@pytest.mark.parametrize("path", _sources())
def test_docstrings_begin_with_a_verb_or_a_noun(path: str) -> None:
    assert unwanted_docstrings((PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""What is planned."""',
        'class A:\n    """Why it failed."""',
        'def f():\n    """Whether it failed."""',
        'async def f():\n    """None: no limit."""',
        'LIMIT = 3\n"""How many there may be."""',
        'class A:\n    limit: int = 3\n    """By namespace."""',
        'class A:\n    def __init__(self):\n        self.a = 1\n        """Of the run."""',
    ],
)
def test_a_noun_clause_is_found_in_each_kind_of_docstring(source: str) -> None:
    assert len(unwanted_docstrings(source)) == 1


def test_words_that_only_begin_alike_and_strings_that_are_no_docstrings_pass() -> None:
    assert unwanted_docstrings('"""Sources of a run."""\nx = 1\n"""Asks."""\ny = "How many"\nprint("What")\n') == []
