"""The part of kopf: it watches runs, Jobs and pods; each event only says "look at this run".

`on.event` handlers alone: they write nothing (no annotation, no finalizer), and no diff decides anything.
kopf's change handlers store what they have seen before they have acted on it; one refused write, and a change
is never shown again. What these handlers miss, the resync makes up for.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import kopf

from ingestrun.control.watch import Watch
from ingestrun.model import names

WATCH_SECONDS: Final = 300
"""How long one watch request lasts; a stream that has died in silence is noticed by its missing bookmarks."""


class NoDiffBase(kopf.DiffBaseStorage):
    """Nothing is remembered, since no handler of ours asks for a diff.

    kopf builds what it would remember for every event all the same: a deep copy of the object, which took a third of
    its work on one.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> NoReturn:
        raise NotImplementedError("a handler that needs a diff was registered")


def operator_settings() -> kopf.OperatorSettings:
    """Set kopf up as we use it: no peering, no scanning, no Events of its own, nothing stored in our objects."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.persistence.finalizer = f"{names.GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=names.GROUP)
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + 10
    settings.watching.connect_timeout = 30
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.process.ultimate_exiting_timeout = 20
    # Filtered by the server: a decorator's `labels=` would stream every Job and pod of the cluster to us first.
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.LABEL_RUN_UID
    settings.watching.label_selectors["v1", "pods"] = names.LABEL_RUN_UID
    return settings


def registry(watch: Watch) -> kopf.OperatorRegistry:
    """The handlers, bound to this process's store and queue."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=handlers, id="runs")
    async def on_run(event: kopf.RawEvent, **_: Any) -> None:
        watch.run(event["type"], event["object"])

    @kopf.on.event("batch", "v1", "jobs", registry=handlers, id="jobs")
    async def on_job(event: kopf.RawEvent, **_: Any) -> None:
        watch.job(event["type"], event["object"])

    @kopf.on.event("v1", "pods", registry=handlers, id="pods")
    async def on_pod(event: kopf.RawEvent, **_: Any) -> None:
        watch.pod(event["type"], event["object"])

    return handlers
