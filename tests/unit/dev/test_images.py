"""What goes into the images, and how they run: the Dockerfile and the lock files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from dev.images.target_requirements import for_target
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
FINAL = ("operator", "worker", "demo-source")
HEAVY = {"pyarrow", "fsspec", "httpx", "duckdb", "numpy", "pandas"}


def entries(lock: Path) -> dict[str, str]:
    """Each locked package's entry, by its name."""
    found = re.split(r"\n(?=[a-z0-9])", lock.read_text().strip())
    return {entry.partition("==")[0]: entry for entry in found}


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage; those before the first stage under ''."""
    found: dict[str, list[str]] = {"": []}
    stage = ""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if match := re.fullmatch(r"FROM \S+ AS (\S+)", line):
            stage = match[1]
            found[stage] = []
        if line and not line.startswith("#"):
            found[stage].append(line)
    return found


def test_the_default_base_is_the_public_one_and_an_argument_replaces_it() -> None:
    assert stages()[""] == ["ARG BASE=python:3.13-slim"]
    assert all(stages()[name][0] == f"FROM ${{BASE}} AS {name}" for name in ("builder", *FINAL))


@pytest.mark.parametrize("name", FINAL)
def test_the_images_are_non_root_and_start_without_a_shell(name: str) -> None:
    lines = stages()[name]
    assert "USER 65532:65532" in lines
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert entry.startswith('ENTRYPOINT ["/venv/bin/')
    assert not [line for line in lines if line.startswith("RUN")]


def test_no_build_step_needs_a_shell() -> None:
    steps = [line for lines in stages().values() for line in lines if line.startswith("RUN")]
    assert steps
    assert all(step.startswith('RUN ["') for step in steps)


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.stem for lock in LOCKS])
def test_every_locked_package_has_hashes_and_no_host_is_named(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    for name, entry in entries(lock).items():
        assert re.match(rf"{re.escape(name)}==\S+", entry), entry[:60]
        assert "--hash=sha256:" in entry, name


@pytest.mark.parametrize("extra", ["operator", "worker", "dev"])
def test_the_locks_hold_what_the_project_asks_for(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"][extra]]
    locked = entries(ROOT / "requirements" / f"{extra}.lock")
    for requirement in map(Requirement, asked):
        version = re.match(r"\S+?==(\S+)", locked[requirement.name.lower().replace("_", "-")])
        assert version, requirement.name
        assert requirement.specifier.contains(version[1], prereleases=True), f"{requirement}: run `make lock`"


def test_the_images_packages_are_those_that_the_tests_run_with() -> None:
    dev = entries(ROOT / "requirements" / "dev.lock")
    for name in ("operator", "worker", "demo"):
        for package, entry in entries(ROOT / "requirements" / f"{name}.lock").items():
            assert dev[package].split()[0] == entry.split()[0]


def test_the_operators_image_has_none_of_the_workers_packages() -> None:
    assert not HEAVY & entries(ROOT / "requirements" / "operator.lock").keys()
    assert not {"kopf", "kubernetes"} & entries(ROOT / "requirements" / "worker.lock").keys()


def test_a_universal_lock_is_cut_to_the_target() -> None:
    lock = (
        "aa==1 \\\n    --hash=sha256:1\n    # via x\n"
        "bb==2 ; python_full_version < '3.12' \\\n    --hash=sha256:2\n"
        "cc==3 ; sys_platform == 'win32' \\\n    --hash=sha256:3 \\\n    --hash=sha256:4\n"
        "dd==4 ; platform_machine == 'aarch64' \\\n    --hash=sha256:5\n"
    )
    assert for_target(lock, "3.13.5", "x86_64") == "aa==1 \\\n    --hash=sha256:1\n"
    assert for_target(lock, "3.11.2", "aarch64") == (
        "aa==1 \\\n    --hash=sha256:1\nbb==2 \\\n    --hash=sha256:2\ndd==4 \\\n    --hash=sha256:5\n"
    )
