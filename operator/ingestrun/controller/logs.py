"""Logs by structlog: JSON for machines, a console form for people; kopf's and aiohttp's in the same stream.

Which run a line is about is bound to the context once per pass (`about_run`), and stands in every line of the pass.
"""

from __future__ import annotations

import contextvars
import logging
import sys
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Final

import structlog

from ingestrun.controller.settings import LogFormat, LogLevel

FIRST_KEYS: Final = ("time", "level", "event", "run", "namespace", "batch", "stage")
"""What people look for in a line, in this order; all other keys follow."""
_QUIET = ("aiohttp.access", "kubernetes", "kopf.activities", "kopf.objects")


def configure(*, fmt: LogFormat, level: LogLevel) -> None:
    """Set the process's logging up; instead of `kopf.configure()`, which would add handlers of its own."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if fmt == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), timestamp_key="time", sort_keys=False)
    )
    tail: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _order_keys]
    if fmt == "json":
        tail.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _lift_kopf_reference], processors=[*tail, renderer]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def about_run(*, name: str, namespace: str, uid: str) -> AbstractContextManager[None]:
    """Bind a run to all lines that are logged in the context.

    The UID stands under a second name, too: `ingest_run_id`, as the first seed document has it in its log line.
    """
    return structlog.contextvars.bound_contextvars(run=name, namespace=namespace, uid=uid, ingest_run_id=uid)


def context_of_pass(*, name: str, namespace: str, uid: str | None) -> contextvars.Context:
    """Return a context for the task of a pass: bound to its run, and to nothing of the pass that has asked for it."""
    context = contextvars.Context()
    context.run(structlog.contextvars.bind_contextvars, run=name, namespace=namespace)
    if uid is not None:
        context.run(structlog.contextvars.bind_contextvars, uid=uid, ingest_run_id=uid)
    return context


def _order_keys(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: event[key] for key in (*FIRST_KEYS, *event) if key in event}


def _lift_kopf_reference(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Kopf puts the object that a line is about on the record; make it fields like those of our own lines."""
    reference = getattr(event.get("_record"), "k8s_ref", None)
    if isinstance(reference, dict):
        for field in ("uid", "name", "namespace"):
            if reference.get(field):
                event.setdefault(field, reference[field])
    return event
