"""The wheels that the image builds install from, made on the host and laid out in build/wheels.

All are parts of a cache: each under the hash of the lock file it comes from.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from dev.cluster.host import check, run
from dev.cluster.parts import Cache, Part

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
WHEELS = ROOT / "build" / "wheels"
OLDEST_GLIBC, NEWEST_GLIBC = 17, 36


@dataclass(frozen=True)
class Target:
    """The target of the wheels: the base image's Python, and the machine by Linux' name."""

    python_version: str
    machine: str


class Wheelhouse:
    """The wheels, taken from the cache if they are there."""

    def __init__(self, cache: Cache, target: Target) -> None:
        self.cache = cache
        self.target = target

    def locked(self, name: str) -> Part:
        """Define the part with the wheels of one lock file, for the target."""
        lock = REQUIREMENTS / f"{name}.lock"
        platforms = [f"manylinux_2_{minor}_{self.target.machine}" for minor in range(OLDEST_GLIBC, NEWEST_GLIBC + 1)]
        arguments = [
            f"--python-version={self.target.python_version}",
            "--only-binary=:all:",
            *(f"--platform={platform}" for platform in (*platforms, f"manylinux2014_{self.target.machine}")),
        ]

        def build(work: Path) -> None:
            wanted = work / "requirements"
            wanted.write_text(self._requirements(lock))
            pip(self.cache, "download", "--require-hashes", *arguments, "-r", str(wanted), "-d", str(work))
            wanted.unlink()

        return Part(f"wheels-{name}", (lock, *arguments), build, 30)

    def built(self, name: str) -> Part:
        """Define the part with wheels that PyPI lacks, built from the source archives whose hashes are in the lock."""
        lock = REQUIREMENTS / f"{name}.lock"

        def build(work: Path) -> None:
            pip(self.cache, "wheel", "--require-hashes", "--no-build-isolation", "-r", str(lock), "-w", str(work))

        return Part(f"built-{name}", (lock, REQUIREMENTS / "build.lock"), build, 10)

    def own(self) -> Part:
        """Define the part with our own wheel.

        Its readme is empty, so that an edit of the readme makes no new images.
        """

        def build(work: Path) -> None:
            stage = work / "stage"
            for path in own_sources():
                target = stage / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            (stage / "README.md").touch()
            pip(self.cache, "wheel", "--no-build-isolation", str(stage), "-w", str(work))
            shutil.rmtree(stage)

        inputs = [item for path in own_sources() for item in (str(path.relative_to(ROOT)), path)]
        return Part("ingestrun", (REQUIREMENTS / "build.lock", *inputs), build, 3)

    def lay_out(self, parts: dict[str, Part]) -> None:
        """Put parts where the Dockerfile copies them from."""
        for name, part in parts.items():
            source, target = self.cache.get(part), WHEELS / name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for wheel in sorted(source.glob("*.whl")):
                try:
                    os.link(wheel, target / wheel.name)
                except OSError:  # another file system
                    shutil.copy2(wheel, target / wheel.name)

    def _requirements(self, lock: Path) -> str:
        script = str(Path(__file__).parent / "target_requirements.py")
        command = [tool_python(self.cache), script, str(lock), self.target.python_version, self.target.machine]
        return check(run(command), f"{lock.name} cannot be read: make it anew by `make lock`.") + "\n"


def own_sources() -> list[Path]:
    """List the source files of our wheel."""
    package = ROOT / "operator" / "ingestrun"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted([*files, ROOT / "pyproject.toml", ROOT / "LICENSE"])


def tool_python(cache: Cache) -> str:
    """Return the Python of an environment with the build tools of requirements/build.lock."""
    lock = REQUIREMENTS / "build.lock"

    def build(work: Path) -> None:
        check(
            run([sys.executable, "-m", "venv", str(work)]), "Python's venv module does not work: install python3-venv."
        )
        install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "-r",
            str(lock),
        ]
        check(
            run([str(work / "bin/python"), *install]),
            "The build tools cannot be installed: see to pip's package index.",
        )

    return str(cache.get(Part("tools", (lock, sys.version, sys.prefix), build, 15)) / "bin" / "python")


def pip(cache: Cache, command: str, *args: str) -> None:
    """Run pip with the user's index settings and without dependencies, because the lock files list all of them."""
    full = [tool_python(cache), "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps", *args]
    check(run(full), f"`pip {command}` failed: see to pip's package index; or is a lock file old (`make lock`)?")
