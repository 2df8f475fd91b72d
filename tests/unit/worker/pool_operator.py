"""The operator's side of the pool, strict and in memory, over real HTTP, with a network that can be made bad.

It keeps what the status of a run would keep: which batch is claimed by whom, at which attempt, and what was permitted.
Whatever a worker must not do is written down in `violations` and refused.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import ValidationError

from ingestrun.model.pool import (
    BODY_MAX_BYTES,
    Claim,
    ClaimAnswer,
    ClaimRequest,
    Fetched,
    FetchedAnswer,
    FetchedRequest,
    Message,
    PublishAnswer,
    PublishRequest,
    Report,
    ReportOutcome,
)

from .support import UID

BASE = "/api/v1/namespaces/default/ingestruns/geo/pool"
CHECK = "/api/v1/namespaces/default/ingestruns/geo/cancellation-check"
Request = TypeVar("Request", bound=Message)


@dataclass
class Ask:
    """A request on its way: `number` counts all of them from 0, `nth` those of its kind."""

    kind: str
    number: int
    nth: int
    worker: str
    body: dict[str, Any]


@dataclass
class Way:
    """What the network does with a request: before the operator has seen it, after, and instead of its answer."""

    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    lose_request: bool = False
    lose_answer: bool = False
    twice: bool = False
    instead: tuple[int, dict[str, Any], dict[str, str]] | None = None


@dataclass
class Batch:
    """A batch, as the status has it."""

    cursor: str = ""
    state: str = ""
    attempt: int = 0
    holder: str | None = None
    fetched: Fetched | None = None
    permitted: set[int] = field(default_factory=set)
    reports: dict[int, Report] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return any(report.outcome is ReportOutcome.DONE for report in self.reports.values())

    @property
    def given_up(self) -> bool:
        report = self.reports.get(self.attempt)
        return report is not None and report.outcome is ReportOutcome.FAILED and bool(report.permanent)


class RefusedError(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


class PoolOperator:
    """One run's pool. `way` decides about each request; the test may set it, and `visible`, at any time."""

    def __init__(self, *, limit: int | None = None, partitions: list[str] | None = None, max_attempts: int = 4) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.limit = limit
        self.partitions = partitions
        self.max_attempts = max_attempts
        self.batches: dict[int, Batch] = (
            {0: Batch()} if partitions is None else {n: Batch(cursor=value) for n, value in enumerate(partitions)}
        )
        self.violations: list[str] = []
        self.asks: list[Ask] = []
        self.leaving: dict[str, str] = {}
        self.replaced: set[str] = set()
        self.way: Callable[[Ask], Way] = lambda _ask: Way()
        self.visible: Callable[[int], bool] = lambda _batch: False
        """Whether readers of the dataset see that batch."""
        self.cancelled: str | None = None
        self.gone = False
        self.long_poll = True
        self.checks = 0

    # --- what the run is in

    def cancel(self) -> None:
        with self.lock:
            self.cancelled = "the run is cancelled"
            self.lock.notify_all()

    def replace(self, worker: str) -> None:
        """Give the worker up, as when its Job has ended: what it holds is for another attempt."""
        with self.lock:
            self.replaced.add(worker)
            self._give_back(worker)

    def _give_back(self, worker: str) -> None:
        for batch in self.batches.values():
            if batch.holder == worker:
                batch.holder = None
                batch.attempt += 1
        self.lock.notify_all()

    @property
    def ended(self) -> bool:
        return all(batch.done or batch.given_up for batch in self.batches.values())

    def reports(self, outcome: str | None = None) -> list[Report]:
        found = [report for number in sorted(self.batches) for report in self.batches[number].reports.values()]
        return [report for report in found if outcome is None or report.outcome == outcome]

    def kinds(self) -> list[str]:
        return [ask.kind for ask in self.asks if ask.kind != "check"]

    # --- what it answers

    def answer(self, kind: str, worker: str, body: bytes) -> Message:
        if worker in self.replaced:
            raise RefusedError(409, "replaced")
        if self.gone:
            raise RefusedError(404, "gone")
        if len(body) > BODY_MAX_BYTES:
            self._refuse(413, f"{len(body)} bytes")
        if kind == "claim":
            return self._claim(worker, self._parse(ClaimRequest, body))
        if kind == "fetched":
            return self._fetched(worker, self._parse(FetchedRequest, body))
        if kind == "publish":
            return self._publish(worker, self._parse(PublishRequest, body))
        raise RefusedError(404, "no such page")

    def _refuse(self, status: int, text: str) -> None:
        self.violations.append(text)
        raise RefusedError(status, text)

    def _parse(self, kind: type[Request], body: bytes) -> Request:
        try:
            message = kind.model_validate_json(body)
        except ValidationError as error:
            self._refuse(422, str(error))
            raise AssertionError from None
        if json.loads(message.render()) != json.loads(body):
            self._refuse(422, f"fields that are not of the protocol: {body!r}")
        return message

    def _claim(self, worker: str, request: ClaimRequest) -> ClaimAnswer:
        for report in request.reports:
            self._take_report(worker, report)
        if worker in self.leaving and request.leaving is None:
            self._refuse(422, f"{worker} claims after it has said that it leaves")
        until = time.monotonic() + request.wait_seconds
        while True:
            if self.cancelled is not None:
                return ClaimAnswer(cancelled=self.cancelled)
            if request.leaving is not None:
                self.leaving[worker] = request.leaving
                self._give_back(worker)
                return ClaimAnswer(exit="goodbye")
            if worker in self.leaving:  # this request was held back, and nobody waits for its answer any more
                return ClaimAnswer(exit="goodbye")
            held = next((number for number, batch in self.batches.items() if batch.holder == worker), None)
            if held is None:
                held = next((n for n, batch in sorted(self.batches.items()) if self._free(batch)), None)
            if held is not None:
                self.batches[held].holder = worker
                return ClaimAnswer(claim=self._claim_of(held))
            if self.ended:
                return ClaimAnswer(exit="every batch is done")
            if not self.lock.wait(max(0.0, until - time.monotonic())):
                return ClaimAnswer(wait=True)

    @staticmethod
    def _free(batch: Batch) -> bool:
        return batch.holder is None and not batch.done and not batch.given_up

    def _claim_of(self, number: int) -> Claim:
        batch = self.batches[number]
        return Claim(
            batch=number,
            attempt=batch.attempt,
            cursor=batch.cursor or None,
            limit=self.limit,
            state=batch.state or None,
            partition=self.partitions is not None,
            idempotency_key=f"{UID}/{number}",
        )

    def _held(self, worker: str, number: int, attempt: int) -> Batch | None:
        """The batch, if it is this worker's at this attempt. None: it was, but is not any more."""
        batch = self.batches.get(number)
        if batch is None or attempt > batch.attempt:
            self._refuse(422, f"{worker} speaks of batch {number}, attempt {attempt}, which nobody has")
            raise AssertionError
        return batch if batch.holder == worker and batch.attempt == attempt else None

    def _take_report(self, worker: str, report: Report) -> None:
        batch = self.batches.get(report.batch)
        known = batch.reports.get(report.attempt) if batch is not None else None
        if known is not None:
            if known != report:
                self._refuse(422, f"two reports of one attempt: {known} and {report}")
            return
        held = self._held(worker, report.batch, report.attempt)
        if held is None:
            return
        if report.outcome is ReportOutcome.DONE:
            if report.attempt not in held.permitted:
                self._refuse(422, f"batch {report.batch} is done without permission")
            if report.fetched != held.fetched:
                self._refuse(422, f"batch {report.batch} has two fetches")
            if report.written and not self.visible(report.batch):
                self._refuse(422, f"batch {report.batch} is said to be published, and nobody sees it")
        elif held.permitted == set() and self.visible(report.batch):
            self._refuse(422, f"batch {report.batch} is published without permission")
        held.reports[report.attempt] = report
        held.holder = None
        if report.outcome is not ReportOutcome.DONE and not held.given_up:
            held.attempt += 1
            if held.attempt >= self.max_attempts:
                self._refuse(422, f"batch {report.batch} has too many attempts")
        self.lock.notify_all()

    def _take_fetched(self, number: int, fetched: Fetched) -> None:
        batch = self.batches[number]
        if batch.fetched is not None and batch.fetched != fetched:
            self._refuse(422, f"batch {number} has two fetches")
        batch.fetched = fetched
        if self.partitions is None and fetched.next_cursor is not None and number + 1 not in self.batches:
            self.batches[number + 1] = Batch(cursor=fetched.next_cursor, state=fetched.state or "")
            self.lock.notify_all()

    def _fetched(self, worker: str, request: FetchedRequest) -> FetchedAnswer:
        if self.cancelled is not None:
            return FetchedAnswer(cancelled=self.cancelled)
        batch = self._held(worker, request.batch, request.attempt)
        if batch is None:
            return FetchedAnswer(accepted=False, message="another attempt has it")
        self._take_fetched(request.batch, request.fetched)
        return FetchedAnswer(accepted=True)

    def _publish(self, worker: str, request: PublishRequest) -> PublishAnswer:
        if self.cancelled is not None:
            return PublishAnswer(cancelled=self.cancelled)
        batch = self._held(worker, request.batch, request.attempt)
        if batch is None:
            return PublishAnswer(granted=False, message="another attempt has it")
        self._take_fetched(request.batch, request.fetched)
        if not batch.permitted and self.visible(request.batch):
            self._refuse(422, f"batch {request.batch} is seen before it has a permission")
        batch.permitted.add(request.attempt)
        return PublishAnswer(granted=True)

    def check(self, wait: float) -> tuple[int, dict[str, Any]]:
        if self.gone:
            return 404, {"error": "gone", "message": "the run is gone"}
        self.checks += 1
        if self.long_poll:
            self.lock.wait_for(lambda: self.cancelled is not None or self.gone, wait)
        return 200, {"id": UID, "cancelled": self.cancelled is not None, "completed": False, "failed": False}


class HangupError(Exception):
    """The connection is closed without an answer."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, *_: object) -> None:
        """A worker that was killed hangs up."""


class Served:
    """The operator at a port; it can go away and come back at the same one."""

    def __init__(self, operator: PoolOperator, tls: ssl.SSLContext | None = None) -> None:
        self.operator = operator
        self.port = 0
        self._tls = tls
        self._server: _Server | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _handler(self.operator, self))
        self.port = self._server.server_port
        if self._tls is not None:
            # The handshake is left to the connection's own thread.
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and hang up on those that are kept."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def away(self) -> bool:
        return self._server is None


def _handler(operator: PoolOperator, served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve(b"")

        def do_POST(self) -> None:
            self._serve(self.rfile.read(int(self.headers["content-length"])))

        def _serve(self, body: bytes) -> None:
            if served.away:
                self.close_connection = True
                return
            try:
                status, answer, headers = self._decide(body)
            except HangupError:
                self.close_connection = True
                return
            text = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def _decide(self, body: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
            url = urlsplit(self.path)
            worker = self.headers.get("authorization", "").removeprefix("Bearer ")
            kind = "check" if url.path == CHECK else url.path.removeprefix(f"{BASE}/")
            if not worker.startswith("worker-"):
                return 401, {"error": "unauthorized", "message": "no such token"}, {}
            with operator.lock:
                nth = sum(ask.kind == kind for ask in operator.asks)
                ask = Ask(kind, len(operator.asks), nth, worker, json.loads(body) if body else {})
                operator.asks.append(ask)
            way = operator.way(ask)
            way.before()
            if way.lose_request:
                raise HangupError
            if way.instead is not None:
                return way.instead
            found = self._answer(kind, worker, body, dict(parse_qsl(url.query)))
            if way.twice:
                again = self._answer(kind, worker, body, dict(parse_qsl(url.query)))
                if again != found and kind != "check":
                    operator.violations.append(f"{found} and then {again} to {ask}")
            way.after()
            if way.lose_answer:
                raise HangupError
            return (*found, {})

        def _answer(self, kind: str, worker: str, body: bytes, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
            with operator.lock:
                if kind == "check":
                    return operator.check(float(query.get("wait", 0)))
                try:
                    return 200, json.loads(operator.answer(kind, worker, body).render())
                except RefusedError as refused:
                    return refused.status, {"error": refused.error}

        def log_message(self, *_: object) -> None:
            pass

    return Handler
