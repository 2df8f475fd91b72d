"""The list of the files that a run reads: the run's first fetch makes it, and every fetch after it reads it.

Each batch would otherwise find the files by itself, and a file that comes or goes between two batches moves the others:
some would be read twice and others not at all. The list is in the workspace, under the UID of the run that began, so a
run that resumes another reads the rest of the same files. Its digest goes into the run's status, so a list that is lost
or differs is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

from ingestrun.model.contract import RUNS_DIRECTORY
from ingestrun.worker.context import Context, parse_key
from ingestrun.worker.errors import PermanentError, SourceChangedError
from ingestrun.worker.stage_io import link_once

_VERSION_FIELDS: Final = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "modified")
"""Names under which file systems tell a file's content or its last change apart, the best first."""


@dataclass(frozen=True)
class ListedFile:
    """A file as it was listed: its name below the pattern's directory, its bytes, and the version of its content."""

    name: str
    size: int
    version: str


def listed_file(name: str, info: Mapping[str, Any]) -> ListedFile:
    """Return the file that a file system describes so."""
    version = next((info[field] for field in _VERSION_FIELDS if info.get(field) is not None), "")
    if info.get("islink"):
        # The link stays as it is when its target changes, as with a mounted ConfigMap.
        with suppress(OSError):
            version = Path(info["name"]).stat().st_mtime
    return ListedFile(name, info.get("size") or 0, str(version))


def fixed_list(
    context: Context, pattern: str, find: Callable[[], Iterable[ListedFile]]
) -> tuple[list[ListedFile], str]:
    """Return the run's list of the files of a pattern, and its digest; if there is none yet, make it by `find`.

    Of fetches that begin at once, the first to be ready makes it. Without a workspace each fetch makes it, and the
    digest shows whether it is still the same.

    Raises:
        PermanentError: the key or the list can't be read.
        SourceChangedError: the list is not that of the run, or is gone, and other files are there now.
    """
    uid, _ = parse_key(context.key)
    shown = Path(RUNS_DIRECTORY, uid, f"files-{hashlib.sha256(pattern.encode()).hexdigest()[:8]}.jsonl")
    path = context.workspace / shown if context.workspace is not None else None
    lost = path is None or not path.exists()
    if path is not None and not lost:
        content = path.read_bytes()
    else:
        content = "".join(json.dumps(astuple(file)) + "\n" for file in find()).encode()
        if path is not None and context.source_digest in (None, _digest(content)):
            _keep(path, content)
            content = path.read_bytes()
    digest = _digest(content)
    if context.source_digest not in (None, digest):
        if path is None:
            what = "the files are not those that the run began with"
        elif lost:
            what = (
                f"{shown}, the list of the files that the run reads, is gone, and the files are not the same any more"
            )
        else:
            what = f"{shown} is not the list of the files that the run began with"
        raise SourceChangedError(f"{what}: records would be missed or read twice, so start a new run")
    try:
        return [ListedFile(*json.loads(line)) for line in content.splitlines()], digest
    except (ValueError, TypeError):
        raise PermanentError(f"{shown} is no list of files: it must stay as the run has written it") from None


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        link_once(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
