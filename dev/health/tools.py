"""The Go program of this folder, built on first use and kept in the cache of the development cluster's parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dev.cluster.host import check, ensure_go, read_settings, run
from dev.cluster.parts import Cache, Part
from dev.cluster.progress import Progress

HERE: Final = Path(__file__).resolve().parent
CLUSTER: Final = HERE.parent / "cluster"
SOURCES: Final = [HERE / name for name in ("go.mod", "go.sum", "main.go")]


@dataclass(frozen=True)
class Health:
    """What a tool says of an object."""

    status: str
    message: str


def program() -> Path:
    """Return the built program; build it if the sources are not those of the cached one."""
    progress = Progress()
    ensure_go(read_settings(CLUSTER / "versions.env")["GO"], progress)

    def build(work: Path) -> None:
        command = ["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", str(work / "health"), "."]
        check(run(command, env={"CGO_ENABLED": "0"}, cwd=HERE), "Building dev/health failed: see to GOPROXY.")

    go = check(run(["go", "env", "GOVERSION"], cwd=HERE), "Go cannot be run.")
    return Cache(progress).get(Part("health", (*SOURCES, go), build, 90)) / "health"


def ask(tool: str, objects: Sequence[Any], *files: Path) -> list[Health]:
    """Return what a tool (kstatus, flux, argocd) says of each object by the given files."""
    command = [str(program()), tool, *map(str, files)]
    said = check(run(command, stdin=json.dumps(objects).encode()), f"{tool} could not be asked.")
    return [Health(**health) for health in json.loads(said)]
