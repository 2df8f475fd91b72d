"""The cache of built parts, each under the hash of its inputs, and only when it is complete.

A part is a directory `<name>-<hash>` in the user's cache folder. It is made in a folder beside it and renamed at the
end, so that an interrupted build, even by kill -9, leaves nothing that looks finished. `PART.json` lists its files and
sizes; a part whose files do not agree is reported as broken and made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dev.cluster.progress import Progress

MANIFEST = "PART.json"


def cache_root() -> Path:
    """Return the user's cache folder, which all checkouts on the machine share."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ingestrun-devcluster"


def content_hash(inputs: Sequence[str | Path]) -> str:
    """Hash texts and files, in order. A file counts by its name and content; its folder does not."""
    digest = hashlib.sha256()
    for item in inputs:
        kind, data = (f"file {item.name}", item.read_bytes()) if isinstance(item, Path) else ("text", item.encode())
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Part:
    """A thing that is built once; `build` fills the empty folder that it is given."""

    name: str
    inputs: Sequence[str | Path] = field(repr=False)
    build: Callable[[Path], None] = field(repr=False)
    expected_seconds: float = 60.0

    @property
    def key(self) -> str:
        return f"{self.name}-{content_hash(self.inputs)}"


class Cache:
    """The folder of parts."""

    def __init__(self, progress: Progress, root: Path | None = None) -> None:
        self.root = root or cache_root()
        self._progress = progress

    def path(self, part: Part) -> Path:
        return self.root / part.key

    def has(self, part: Part) -> bool:
        return fault(self.path(part)) is None

    def get(self, part: Part) -> Path:
        """Return the part's folder; build it if it is missing or broken."""
        path = self.path(part)
        if fault(path) is None:
            os.utime(path)
            return path
        with locked(self.root / "locks" / part.name):
            problem = fault(path)
            if problem is None:  # another process made it while this one waited
                return path
            if path.exists():
                self._progress.say(f"the cached part {part.key} is broken ({problem}): it is made again")
                shutil.rmtree(path)
            # Only the holder of the lock writes there, so what is left there is of a build that died.
            work = self.root / "making" / part.name
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            with self._progress.step(f"build {part.name}", part.expected_seconds):
                part.build(work)
            sizes = {str(f.relative_to(work)): f.stat().st_size for f in sorted(work.rglob("*")) if f.is_file()}
            manifest = {"files": sizes, "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
            work.rename(path)
        return path

    def prune(self, keep: Sequence[Part], older_than_days: float = 14.0) -> list[str]:
        """Remove older versions of these parts that were not used for a while; return their names."""
        gone = []
        for part in keep:
            for path in self.root.glob(f"{part.name}-" + "?" * 16):
                if path.name != part.key and time.time() - path.stat().st_mtime > older_than_days * 86400:
                    shutil.rmtree(path, ignore_errors=True)
                    gone.append(path.name)
        return gone


def fault(path: Path) -> str | None:
    """Return why a part's folder is broken, or None if it is complete."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, size in files.items():
            if (path / name).stat().st_size != size:
                return f"{name} has another size than when it was made"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None
