"""/healthz and /readyz: alive means that the loops make progress, not only that a socket answers."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web


class Health:
    """Loops report here; one that has been silent for longer than it promised makes the process unhealthy."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[str, float] = {}
        self.role = "starting"
        """`starting`, `standby` or `leading`; a standby is ready: it is as it should be."""

    def beat(self, loop: str, *, within: float) -> None:
        """The loop is alive and will say so again within so many seconds."""
        self._due[loop] = self._clock() + within

    def stalled(self) -> list[str]:
        """The loops that are overdue."""
        now = self._clock()
        return sorted(loop for loop, due in self._due.items() if due < now)

    async def serve(self, port: int) -> web.AppRunner:
        """Answer on the port until the returned runner is cleaned up. Raises OSError when the port is taken."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, port=port).start()
        return runner

    async def _healthz(self, _: web.Request) -> web.Response:
        stalled = self.stalled()
        if stalled:
            return web.Response(status=503, text=f"stalled: {', '.join(stalled)}\n")
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.role == "starting" else 200, text=f"{self.role}\n")
