"""Make what krew installs: an archive with the plugin and the packages that it needs, and the manifest of it.

The archive is the same on each machine and for each: pure Python, in a fixed order, without times.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from dev.cluster.parts import Cache
from dev.images.wheels import REQUIREMENTS, ROOT, own_sources, pip

BUILD: Final = ROOT / "build" / "krew"
TEMPLATE: Final = ROOT / "manifests" / "krew" / "ingestrun.yaml"
DEFAULT_URL: Final = "https://ingestrun.dev/releases"
PARTS: Final = ("cli", "model")
"""The packages of `ingestrun` that the plugin consists of."""
LEFT_OUT: Final = ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "bin")
"""What the lock file has for the other programs' sake, and the plugin does not import."""
LAUNCHER: Final = '''#!/usr/bin/env python3
"""kubectl ingestrun and, by its other name, the completions of it."""
import os, sys
if sys.version_info < (3, 11):
    sys.exit("kubectl-ingestrun needs Python 3.11 or newer, and python3 is %d.%d" % sys.version_info[:2])
sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "lib"))
if os.path.basename(sys.argv[0]).startswith("kubectl_complete"):
    from ingestrun.cli.completion import main
else:
    from ingestrun.cli.main import main
main()
'''

Install = Callable[[Path], None]
"""Puts the packages of requirements/cli.lock into a folder."""


def make_archive(cache: Cache) -> None:
    """Make the archive and the manifest in build/krew."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "operator" / "ingestrun" / "__init__.py").read_text())
    version = f"v{found[1]}" if found else ""
    url = os.environ.get("KREW_URL") or DEFAULT_URL
    shutil.rmtree(BUILD, ignore_errors=True)
    lay_out(BUILD / "plugin", partial(install_locked, cache))
    archive = BUILD / f"kubectl-ingestrun-{version}.tar.gz"
    archive.write_bytes(packed(BUILD / "plugin"))
    shutil.rmtree(BUILD / "plugin")
    manifest = BUILD / TEMPLATE.name
    manifest.write_text(filled(TEMPLATE.read_text(), version, f"{url}/{archive.name}", archive.read_bytes()))
    for path in (archive, manifest):
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")


def install_locked(cache: Cache, folder: Path) -> None:
    """Install the locked packages."""
    lock = str(REQUIREMENTS / "cli.lock")
    pip(cache, "install", "--no-compile", "--require-hashes", "-r", lock, "--target", str(folder))


def lay_out(folder: Path, install: Install) -> None:
    """Put the launcher, the plugin and its packages into a folder."""
    library = folder / "lib"
    library.mkdir(parents=True)
    install(library)
    for path in [path for name in LEFT_OUT for path in (library / name, *library.glob(f"{name}-*.dist-info"))]:
        shutil.rmtree(path, ignore_errors=True)
        path.with_suffix(".py").unlink(missing_ok=True)
    for source in own_sources():
        within = source.relative_to(ROOT)
        if within.parts[:2] == ("operator", "ingestrun") and (within.parts[2] in PARTS or len(within.parts) == 3):
            target = library / within.relative_to("operator")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    launcher = folder / "kubectl-ingestrun"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)


def packed(folder: Path) -> bytes:
    """Return a folder as an archive that depends on nothing but the files' names and contents."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for path in _pure(folder):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.mode, entry.size = (0o755 if os.access(path, os.X_OK) else 0o644), path.stat().st_size
            with path.open("rb") as content:
                archive.addfile(entry, content)
    return gzip.compress(raw.getvalue(), mtime=0)


def _pure(folder: Path) -> Iterator[Path]:
    """Yield the files, without what is compiled: PyYAML and charset-normalizer work without theirs."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".so", ".pyd", ".pyc", ".pyi") and "RECORD" not in path.name:
            yield path


def filled(template: str, version: str, uri: str, archive: bytes) -> str:
    """Return the manifest with what is known once the archive is there."""
    values = {"@VERSION@": version, "@URI@": uri, "@SHA256@": hashlib.sha256(archive).hexdigest()}
    for mark, value in values.items():
        template = template.replace(mark, value)
    return template
