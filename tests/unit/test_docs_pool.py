"""The table of docs/pool.md: each feature names the tests that show it in both modes, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "unit"


def rows() -> list[list[str]]:
    """The rows of the table: the feature, and the tests in each mode."""
    section = (ROOT / "docs" / "pool.md").read_text().partition("## Features in both modes")[2]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_feature_is_tested_in_both_modes() -> None:
    trees = [(path, ast.parse(path.read_text())) for path in TESTS.rglob("test_*.py")]
    known = {
        (path.name, node.name)
        for path, tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)
    }
    found = rows()
    assert len(found) > 20
    for feature, *modes in found:
        for mode, cell in zip(("jobs", "pool"), modes, strict=True):
            tests = re.findall(r"`(test_\w+)`", cell)
            assert tests, f"{feature}: no test with {mode}"
            for test in tests:
                files = {file for file, name in known if name == test}
                fits = {file for file in files if file.startswith("test_pool") == (mode == "pool")}
                assert fits, f"{feature}: there is no {test} for {mode}"
