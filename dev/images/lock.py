"""Make the lock files: all versions and files' hashes, for all supported Pythons, without paths or hosts."""

from __future__ import annotations

from dev.cluster.host import check, run, which
from dev.cluster.parts import Cache
from dev.images.wheels import REQUIREMENTS, ROOT, tool_python

OLDEST_PYTHON = "3.11"
COMMON = (
    "--universal",
    "--python-version",
    OLDEST_PYTHON,
    "--generate-hashes",
    "--no-emit-index-url",
    "--no-header",
    "--quiet",
)


def make_locks(cache: Cache, *, upgrade: bool) -> None:
    """Make all lock files. Each takes its versions from the dev one, which holds everything."""
    refresh = ("--upgrade",) if upgrade else ()
    uv = _uv(cache)
    dev = "requirements/dev.lock"

    def compile_to(out: str, *args: str) -> None:
        command = [*uv, "pip", "compile", *COMMON, *refresh, *args, "--output-file", out]
        check(run(command, cwd=ROOT), f"{out} cannot be made: see to the package index, and to pyproject.toml.")

    compile_to("requirements/build.lock", "requirements/build.in")
    compile_to(dev, "pyproject.toml", "--extra", "operator", "--extra", "worker", "--extra", "cli", "--extra", "dev")
    for name in ("operator", "worker", "cli"):
        compile_to(f"requirements/{name}.lock", "pyproject.toml", "--extra", name, "--constraint", dev)
    for name in ("demo", "demo-data"):
        compile_to(f"requirements/{name}.lock", f"requirements/{name}.in", "--no-deps", "--constraint", dev)


def _uv(cache: Cache) -> list[str]:
    """Return the command of the locked uv; before there is a lock, of the one on the PATH."""
    if (REQUIREMENTS / "build.lock").exists():
        return [tool_python(cache), "-m", "uv"]
    return [which("uv") or "uv"]
