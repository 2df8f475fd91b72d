"""Install from the wheelhouse, remove what is not needed and compile; the image builds run this by the base's Python.

prepare                    tools with pip, an empty /venv, and the standard library's bytecode where the base lacks it
packages [--check A,B]     /lock from /wheels into /venv, by hash; then our own builds in /built, if there are any
app --script NAME          our own wheel in /own into /app, to be laid over /venv as a layer of its own
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VENV = Path("/venv")
TOOLS = Path("/tools")
STDLIB = Path("/stdlib")

NOT_AT_RUN_TIME = ("*.pyx", "*.pxd", "*.pxi", "*.pyi", "*.h", "*.hpp", "*.c", "*.cc", "*.cpp", "*.a")
TEST_FOLDERS = ("tests", "test")
# Parts of pyarrow that nothing here loads: Flight (RPC), Substrait's module, cloud file systems, encryption, tests. Its
# other modules import them only if they are there. libarrow_substrait stays, because pyarrow's core is linked to it.
PYARROW_PARTS = ("flight", "_substrait.cpython", "s3", "gcsfs", "azurefs", "hdfs", "encryption", "cpp_tests", "gandiva")
# Large generated packages, kept only as bytecode without docstrings, a third of the size. Tracebacks lack source lines.
BYTECODE_ONLY = ("kubernetes",)
UNUSED_STDLIB = {
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["prepare", "packages", "app"])
    parser.add_argument("--check", default="")
    parser.add_argument("--script", default="")
    given = parser.parse_args()
    if given.step == "prepare":
        prepare()
    elif given.step == "packages":
        packages([name for name in given.check.split(",") if name])
    else:
        app(given.script)


def prepare() -> None:
    """Make two environments, so that /venv never holds pip, and compile the standard library.

    The public Python image lacks its bytecode, and with a read-only root each start would compile anew what it imports.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    # Nothing has imported colorsys yet, so its bytecode can only be the base's.
    compiled_already = Path(importlib.util.cache_from_source(str(library / "colorsys.py"))).exists()
    run([sys.executable, "-m", "venv", str(TOOLS)])
    run([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
    STDLIB.mkdir()
    if compiled_already:
        return
    for source in library.rglob("*.py"):
        if not UNUSED_STDLIB & set(source.relative_to(library).parts):
            target = STDLIB / importlib.util.cache_from_source(str(source)).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                py_compile.compile(str(source), str(target), str(source), doraise=True, invalidation_mode=UNCHECKED)
            except py_compile.PyCompileError:
                continue  # the library has a few templates that are not valid modules


def packages(check: list[str]) -> None:
    """Install exactly what the lock lists, remove what is not needed, and check that the rest still imports."""
    pip("--require-hashes", "--find-links", "/wheels", "-r", "/lock")
    built = sorted(Path("/built").glob("*.whl")) if Path("/built").is_dir() else []
    if built:
        pip(*map(str, built))
    site = site_packages(VENV)
    for pattern in NOT_AT_RUN_TIME:
        for path in site.rglob(pattern):
            path.unlink()
    for name in TEST_FOLDERS:
        for path in [*site.glob(f"*/{name}"), *site.glob(f"*/*/{name}")]:
            shutil.rmtree(path)
    trim_pyarrow(site / "pyarrow")
    for name in BYTECODE_ONLY:
        bytecode_only(site / name)
    compiled(site)
    for module in check:
        run([str(VENV / "bin/python"), "-c", f"import {module}"])


def app(script: str) -> None:
    """Install our own wheel, with only the entry point that the image runs."""
    target = Path("/app")
    pip("--prefix", str(target), *map(str, sorted(Path("/own").glob("*.whl"))))
    for path in (target / "bin").iterdir():
        if path.name != script:
            path.unlink()
    compiled(site_packages(target))


def pip(*args: str) -> None:
    common = ["--python", str(VENV / "bin/python"), "--disable-pip-version-check", "--no-cache-dir"]
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--root-user-action=ignore"]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    run([str(TOOLS / "bin/python"), "-m", "pip", *common, *install, *args], environment)


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=environment)  # noqa: S603 - command lines of ours, no shell


def site_packages(root: Path) -> Path:
    return root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def trim_pyarrow(folder: Path) -> None:
    """Remove what nothing here loads, and the second and third copy of its libraries (a wheel has no links)."""
    if not folder.is_dir():
        return
    for name in ("include", "src"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob("*.so*"):
        library = path.name.startswith("lib") and not path.name.startswith("lib.")
        version = path.name.partition(".so")[2].strip(".")
        if (library and not version.isdigit()) or any(part in path.name for part in PYARROW_PARTS):
            path.unlink()


def bytecode_only(folder: Path) -> None:
    if not folder.is_dir():
        return
    if not compileall.compile_dir(folder, quiet=1, legacy=True, optimize=2, workers=0, invalidation_mode=UNCHECKED):
        raise SystemExit(f"{folder.name} does not compile")
    for path in folder.rglob("*.py"):
        path.unlink()


def compiled(folder: Path) -> None:
    """Compile to bytecode that Python trusts without a look at the source's date, so that a start writes nothing."""
    compileall.compile_dir(folder, quiet=2, workers=0, invalidation_mode=UNCHECKED)


if __name__ == "__main__":
    main()
