"""The import contracts themselves are checked by `make lint`; here, that the planner's has every module."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def listed(container: str) -> list[str]:
    """The modules that the layers of a contract name, one by one."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract.get("containers") == [container]]
    return [module.strip() for layer in layers for module in layer.split("|")]


def test_each_module_of_the_planner_has_one_place_in_the_order() -> None:
    package = ROOT / "operator" / "ingestrun" / "planner"
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules
    assert sorted(listed("ingestrun.planner")) == sorted(modules)
