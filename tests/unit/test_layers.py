"""Imports point one way: `model <- engine <- control -> kube -> model`; `worker` and `cli` see `model` alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "operator" / "ingestrun"
ALLOWED = {
    "model": set(),
    "engine": {"model"},
    "kube": {"model"},
    "control": {"model", "engine", "kube"},
    "worker": {"model"},
    "cli": {"model"},
}
FOREIGN = {
    "model": {"kopf", "kubernetes", "aiohttp", "structlog", "pyarrow", "httpx", "asyncio"},
    "engine": {"kopf", "kubernetes", "aiohttp", "structlog", "asyncio", "time"},
    "kube": {"kopf"},
    "worker": {"kopf", "kubernetes"},
}


def imports_of(source: str) -> set[str]:
    """The modules that a source imports, those inside functions and type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(layer: str, source: str) -> set[str]:
    """The imports in a layer's source that point the wrong way."""
    wrong = set()
    for name in imports_of(source):
        parts = name.split(".")
        if parts[0] == "ingestrun" and len(parts) > 1 and parts[1] in ALLOWED:
            if parts[1] != layer and parts[1] not in ALLOWED[layer]:
                wrong.add(name)
        elif parts[0] in FOREIGN.get(layer, set()):
            wrong.add(name)
    return wrong


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_point_one_way(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files or layer == "cli", f"no source in {layer}"
    for path in files:
        assert violations(layer, path.read_text()) == set(), path


def test_only_the_handlers_and_main_know_kopf() -> None:
    knowing = {path.name for path in (ROOT / "control").glob("*.py") if "kopf" in imports_of(path.read_text())}
    assert knowing == {"handlers.py", "operator.py"}


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("model", "from ingestrun.engine import plan"),
        ("engine", "import ingestrun.kube.client"),
        ("engine", "def f():\n    import kopf"),
        ("kube", "from ingestrun.engine import plan"),
        ("worker", "from ingestrun import engine"),
    ],
)
def test_a_wrong_import_is_seen(layer: str, source: str) -> None:
    assert violations(layer, source)
