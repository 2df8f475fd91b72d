"""A Secret that all replicas share: the one that comes first fills it, by compare-and-set, and all take it from there.

So two replicas that race end with the same content. The Secret comes empty with the manifests, because the operator may
create none.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping
from typing import Final, NoReturn

import structlog

from ingestrun.kube.errors import Conflict, Forbidden, KubeError, NotFound
from ingestrun.kube.protocol import Cluster, Object

logger = structlog.get_logger("ingestrun.http")

REFRESH_SECONDS: Final = 60.0
"""Interval at which the Secret is read again, and so the time for which a replica may use replaced content."""
RETRY_SECONDS: Final = 5.0
_ROUNDS: Final = 5

Data = Mapping[str, bytes]
"""The content of a Secret, decoded."""


class SharedSecret:
    """One Secret, as last read by this replica. To be derived from: the content is the derived class's."""

    what: str
    """Name of the content in logs."""

    def __init__(self, cluster: Cluster, *, namespace: str, name: str, alone: bool) -> None:
        """Start without content. With `alone` (no cluster, so no shared Secret) the process makes its own."""
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._alone = alone
        self._own: Data = {}
        self._complained = False

    def renewed(self, data: Data) -> Data | None:
        """Return what has to stand in the Secret in place of `data`; None if it is good. Raises KubeError."""
        raise NotImplementedError

    def take(self, data: Data) -> None:
        """Use the content, which is good. Raises KubeError."""
        raise NotImplementedError

    async def refresh(self) -> None:
        """Read the Secret, and fill it if it needs that. Raises KubeError; then what is known stays in use."""
        for _ in range(_ROUNDS):
            try:
                secret = await self._cluster.get_secret(namespace=self._namespace, name=self._name)
            except (NotFound, Forbidden):
                if not self._alone:
                    raise
                self._own = self.renewed(self._own) or self._own
                self.take(self._own)
                return
            data = _decoded(secret)
            new = self.renewed(data)
            if new is not None:
                text = {field: base64.b64encode(value).decode() for field, value in new.items()}
                try:
                    await self._cluster.replace_secret({**secret, "data": text})
                except Conflict:
                    continue
                data = new
                logger.info(f"made {self.what}", secret=f"{self._namespace}/{self._name}")
            self.take(data)
            return
        raise Conflict(f"the Secret {self._name} changed {_ROUNDS} times while it was filled")

    async def try_refresh(self) -> bool:
        """Call `refresh`; a failure is logged, once until it works again."""
        try:
            await self.refresh()
        except KubeError as error:
            if not self._complained:
                logger.warning(
                    f"{self.what} could not be had: pods go on without the cancellation check",
                    secret=f"{self._namespace}/{self._name}",
                    error=str(error),
                )
            self._complained = True
            return False
        self._complained = False
        return True

    async def keep(self) -> NoReturn:
        """Refresh for ever, because the content may be replaced, or may not have been readable at first."""
        while True:
            done = await self.try_refresh()
            await asyncio.sleep(REFRESH_SECONDS if done else RETRY_SECONDS)


def _decoded(secret: Object) -> Data:
    """Return the Secret's content; a field that is no base64, which no API server has, is empty."""
    found = {}
    for field, text in (secret.get("data") or {}).items():
        try:
            found[field] = base64.b64decode(text or "", validate=True)
        except (binascii.Error, ValueError):
            found[field] = b"?"
    return found
