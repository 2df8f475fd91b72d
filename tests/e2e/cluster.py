"""The deployed operator seen from outside: kubectl, as a user has it, in the cluster that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

ROOT: Final = Path(__file__).parents[2]
SYSTEM: Final = "ingestrun-system"
Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Kubectl:
    """kubectl with the one context that these tests may touch."""

    context: str

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        """Run it; the output. Fails the test with what kubectl complains of."""
        command = ["kubectl", "--context", self.context, *arguments]
        done = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}"
        return done.stdout

    def get(self, *arguments: str) -> Json:
        """An object, or a list."""
        found: Json = json.loads(self("get", *arguments, "-o", "json"))
        return found

    def apply(self, objects: Sequence[Json]) -> None:
        """Apply these objects."""
        self("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def rendered(self, folder: str) -> list[Json]:
        """The objects of a kustomization of this repository."""
        return [found for found in yaml.safe_load_all(self("kustomize", folder)) if found]


def wait_for(look: Callable[[], T], *, seconds: float, what: str) -> T:
    """Ask again until the answer is true, and give it back."""
    deadline = time.monotonic() + seconds
    while True:
        answer = look()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)


def image(variable: str) -> str:
    """An image that `make images` has built, by its variable in build/images.env."""
    value = os.environ.get(variable)
    assert value, f"{variable} is not set: run `make test-e2e`, which reads build/images.env"
    return value


def condition(run: Json, kind: str) -> Json:
    """A condition of a run; empty where it has none of that type."""
    found: Sequence[Json] = (run.get("status") or {}).get("conditions") or ()
    return next((c for c in found if c["type"] == kind), {})


def phase(run: Json) -> str:
    """A run's phase, or nothing."""
    return str((run.get("status") or {}).get("phase", ""))
