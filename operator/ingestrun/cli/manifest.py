"""The manifest of a run, from a file or from flags."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from ingestrun.cli.errors import CliError, UsageError
from ingestrun.cli.runs import Json
from ingestrun.model.names import GROUP, KIND, VERSION


def manifests_of_file(name: str) -> list[Json]:
    """Read the runs of a file; `-` is the standard input. Raises CliError."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        raise CliError(f'error: the path "{name}" cannot be read: {error.strerror}') from None
    try:
        bodies = [body for body in yaml.safe_load_all(text) if body]
    except yaml.YAMLError as error:
        raise CliError(f"error: error parsing {name}: {error}") from None
    for body in bodies:
        if not isinstance(body, dict) or body.get("kind") != KIND or not isinstance(body.get("metadata"), dict):
            raise CliError(f"error: {name} has something else than {KIND}s: use kubectl create for it")
    if not bodies:
        raise CliError("error: no objects passed to create")
    return bodies


def manifest_of_flags(options: Namespace, name: str, namespace: str) -> Json:
    """Return the run that the flags describe. Raises UsageError."""
    if (options.http is None) == (options.files is None):
        raise UsageError("give exactly one of --http and --files, or a manifest with -f")
    if options.to is None or options.claim is None:
        raise UsageError("required flag(s) not set: --to, --claim")
    spec: Json = {
        "source": _http(options)
        if options.http is not None
        else {"files": _given(path=options.files, format=options.format)},
        "sink": {"parquet": {"path": options.to}},
        "workspace": {"persistentVolumeClaim": {"claimName": options.claim}},
        "batches": {**_division(options), **_given(size=options.size, limit=options.limit)},
        **_given(parallelism=options.parallelism, retries=options.retries, suspend=options.suspend or None),
    }
    if options.parent:
        spec["parentRef"] = {"name": options.parent}
    labels = dict(_label(text) for text in options.label)
    meta: Json = {"name": name, "namespace": namespace, **({"labels": labels} if labels else {})}
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": meta, "spec": spec}


def _given(**values: Any) -> Json:
    return {key: value for key, value in values.items() if value is not None}


def _http(options: Namespace) -> Json:
    kind, _, path = options.pagination.partition("=")
    if kind not in ("page", "offset", "link", "cursor") or bool(path) != (kind == "cursor"):
        raise UsageError(f'invalid argument "{options.pagination}" for "--pagination" flag: see --help')
    details = {"cursor": {"path": path}}.get(kind, {})
    if options.total_path and kind in ("page", "offset"):
        details = {"totalPath": options.total_path}
    return {"http": {"url": options.http, **_given(records=options.records), "pagination": {kind: details}}}


def _division(options: Namespace) -> Json:
    if options.partitions is None:
        return {"cursor": {}}
    if options.partitions.isdigit():
        return {"partitions": {"count": int(options.partitions)}}
    return {"partitions": {"values": [value for value in options.partitions.split(",") if value]}}


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f'invalid label "{text}": give KEY=VALUE')
    return key, value
