"""The worker asks whether its run is cancelled: before it starts, between pages, before a commit. No answer is a no."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from ingestrun.worker import cancellation
from ingestrun.worker.cancellation import CancellationClient
from ingestrun.worker.shutdown import Stop

from .support import UID, Answer, Bench, Reply, Request, Site, page
from .test_main import spawn

ROWS = pa.table({"id": list(range(1000))})
PATH = "/api/v1/namespaces/default/ingestruns/geo/cancellation-check"
SINK = {"parquet": {"path": "data"}}
HOOK = {"validate": {"columns": [{"name": "id", "type": "integer"}]}}


def says(cancelled: bool, **more: Any) -> Reply:
    phase = "Cancelled" if cancelled else "Running"
    said = {"id": UID, "phase": phase, "cancelled": cancelled, "completed": False, "failed": False}
    return page(said | more)


GONE = Reply(404, b'{"error": "gone", "message": "the run is gone"}')


@pytest.fixture
def check(sites: Callable[[], Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    """The operator's end; every safe point asks it."""
    monkeypatch.setattr(cancellation, "INTERVAL", 0.0)
    operator = sites()
    operator.answer = lambda _request: says(False)
    return operator


def told(check: Site) -> dict[str, Any]:
    return {"cancellation_url": check.url + PATH, "cancellation_token": "hunter2"}


def http(site: Site) -> dict[str, Any]:
    return {"http": {"url": site.url, "pageSize": 10, "pagination": {"page": {}}}}


def ten(request: Request) -> Reply:
    number = int(request.params["page"])
    return page([{"id": 10 * number + index} for index in range(10)] if number <= 5 else [])


def assert_stopped(answer: Answer, message: str, read: int) -> None:
    assert answer.code == 0
    assert answer.result is not None
    assert (answer.result.outcome, answer.result.read, answer.result.written) == ("cancelled", read, 0)
    assert answer.message == message
    assert not answer.result.exhausted
    assert answer.result.next_cursor is None


def lines(capsys: pytest.CaptureFixture[str], event: str) -> list[dict[str, Any]]:
    out = capsys.readouterr().out
    assert "hunter2" not in out
    return [line for line in map(json.loads, out.splitlines()) if line["event"] == event]


def test_it_asks_with_its_token_and_goes_on(bench: Bench, site: Site, check: Site) -> None:
    site.answer = ten
    answer = bench.run("fetch", http(site), limit=25, **told(check))
    assert answer.result is not None
    assert (answer.code, answer.result.outcome, answer.result.read) == (0, "done", 25)
    assert {request.path for request in check.requests} == {PATH}
    assert {request.headers["authorization"] for request in check.requests} == {"Bearer hunter2"}


@pytest.mark.parametrize(("reply", "words"), [(says(True), "the run is cancelled"), (GONE, "the run is gone")])
def test_cancelled_before_the_start_nothing_is_read(
    bench: Bench, site: Site, check: Site, reply: Reply, words: str
) -> None:
    check.answer = lambda _request: reply
    answer = bench.run("fetch", http(site), limit=25, **told(check))
    assert_stopped(answer, f"{words}, stopped after 0 of 25 rows", 0)
    assert site.requests == []
    assert len(check.requests) == 1
    assert not bench.dir("fetch").exists()


def test_cancelled_between_pages(bench: Bench, site: Site, check: Site) -> None:
    site.answer = ten
    check.answer = lambda _request: says(len(site.requests) >= 2)
    answer = bench.run("fetch", http(site), limit=45, **told(check))
    assert_stopped(answer, "the run is cancelled, stopped after 20 of 45 rows", 20)
    assert len(site.requests) == 2
    assert list(bench.dir("fetch").parent.iterdir()) == []


def test_cancelled_while_the_source_asks_to_wait(
    bench: Bench, site: Site, check: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute's Retry-After holds no cancelled pod: it asks every two seconds."""
    slept: list[float] = []
    monkeypatch.setattr("ingestrun.worker.shutdown.sleep", slept.append)
    site.answer = lambda _request: Reply(429, b"", {"retry-after": "55"})
    check.answer = lambda _request: says(len(slept) >= 3)
    answer = bench.run("fetch", http(site), limit=45, **told(check))
    assert_stopped(answer, "the run is cancelled, stopped after 0 of 45 rows", 0)
    assert slept == [2, 2, 2]
    assert len(site.requests) == 1


def test_wait_is_as_long_as_it_was_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ingestrun.worker.shutdown.sleep", slept.append)
    for seconds in (0.5, 4, 5.5, 0):
        Stop().wait(seconds)
    assert slept == [0.5, 2, 2, 2, 2, 1.5]


def test_cancelled_after_the_last_page(bench: Bench, site: Site, check: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before the output takes its name in any case, however short ago the last question was."""
    monkeypatch.setattr(cancellation, "INTERVAL", 3600.0)
    site.answer = lambda _request: page([])
    check.answer = lambda _request: says(len(check.requests) == 2)
    answer = bench.run("fetch", http(site), **told(check))
    assert_stopped(answer, "the run is cancelled, stopped after 0 rows", 0)
    assert list(bench.dir("fetch").parent.iterdir()) == []


def test_cancelled_between_files(bench: Bench, check: Site) -> None:
    for name in "abc":
        (bench.workspace / f"{name}.csv").write_text("id\n1\n2\n")
    check.answer = lambda _request: says(len(check.requests) == 3)
    answer = bench.run("fetch", {"files": {"path": "*.csv"}}, **told(check))
    assert_stopped(answer, "the run is cancelled, stopped after 4 rows", 4)


def test_cancelled_between_row_groups_of_a_hook(bench: Bench, check: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestrun.worker.stage_io.ROW_GROUP_ROWS", 400)
    bench.hand_on(ROWS)
    check.answer = lambda _request: says(len(check.requests) == 3)
    answer = bench.run("hook", HOOK, **told(check))
    assert_stopped(answer, "the run is cancelled, stopped after 400 of 1000 rows", 400)
    assert not bench.dir("hook").exists()
    assert not bench.dir("rejects").exists()


def test_a_cancelled_publish_publishes_nothing(bench: Bench, check: Site) -> None:
    """The last question is the one before the commit, with everything written and audited."""
    bench.hand_on(ROWS)
    check.answer = lambda _request: says(len(check.requests) == 3)
    answer = bench.run("publish", SINK, **told(check))
    assert_stopped(answer, "the run is cancelled, stopped after 1000 of 1000 rows", 1000)
    assert list((bench.workspace / "data").rglob("*.parquet")) == []
    assert [path for path in (bench.workspace / "data").rglob("*") if path.is_file()] == []
    check.answer = lambda _request: says(False)
    assert bench.run("publish", SINK, attempt=1, **told(check)).code == 0
    assert len(list((bench.workspace / "data").glob("*.parquet"))) == 1


def test_a_publish_asks_before_it_reads(bench: Bench, check: Site) -> None:
    check.answer = lambda _request: says(True)
    assert_stopped(bench.run("publish", SINK, **told(check)), "the run is cancelled, stopped after 0 rows", 0)


def test_what_an_earlier_attempt_published_is_said_to_be_published(bench: Bench, check: Site) -> None:
    bench.hand_on(ROWS)
    assert bench.run("publish", SINK, **told(check)).code == 0
    check.answer = lambda _request: says(True)
    answer = bench.run("publish", SINK, attempt=1, **told(check))
    assert answer.result is not None
    assert (answer.code, answer.result.outcome, answer.result.written) == (0, "done", 1000)


NO_ANSWERS = {
    "401": Reply(401, b'{"error": "unauthorized", "message": "the token has expired"}'),
    "403": Reply(403, b'{"error": "forbidden", "message": "of another run"}'),
    "503": Reply(503, b'{"error": "unavailable", "message": "ask again"}'),
    "another server's 404": Reply(404, b"<html>not found</html>"),
    "another server's 200": Reply(200, b'{"cancelled": true}'),
    "another run's": says(True, id="00000000-0000-0000-0000-000000000000"),
    "no verdict": page({"id": UID, "cancelled": "yes"}),
    "no JSON": Reply(200, b"{"),
    "JSON that is no object": Reply(200, b"[true]"),
    "deep JSON": Reply(200, b"[" * 60_000),
    "elsewhere": Reply(302, b"", {"location": "http://127.0.0.1:1/"}),
    "too much": Reply(200, b" " * 200_000),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_does_not_stop_it(
    bench: Bench, site: Site, check: Site, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answer = ten
    check.answer = lambda _request: NO_ANSWERS[name]
    answer = bench.run("fetch", http(site), limit=25, **told(check))
    assert answer.result is not None
    assert (answer.code, answer.result.outcome) == (0, "done")
    (line,) = lines(capsys, "the cancellation check gives no answer, going on")
    assert line["why"]
    # At the start and before the output takes its name; each once more where another try may help.
    assert len(check.requests) == (4 if name == "503" else 2)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "http://nowhere.invalid/x", "ftp://x/y", "http://[::1", "http://h:x/"]
)
def test_an_address_that_does_not_answer_does_not_stop_it(
    bench: Bench, site: Site, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answer = ten
    answer = bench.run("fetch", http(site), limit=25, cancellation_url=url, cancellation_token="hunter2\nx")
    assert answer.code == 0
    assert len(lines(capsys, "the cancellation check gives no answer, going on")) == 1


def test_an_operator_that_never_answers_costs_little(
    bench: Bench, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cancellation, "INTERVAL", 0.0)
    monkeypatch.setattr(cancellation, "TIMEOUT", 0.2)
    site.answer = ten
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}{PATH}"
        began = time.monotonic()
        answer = bench.run("fetch", http(site), limit=45, cancellation_url=url, cancellation_token="hunter2")
        took = time.monotonic() - began
    assert answer.code == 0
    assert 0.8 <= took < 2.5, "two questions of two tries each, however many pages there are"
    assert len(lines(capsys, "the cancellation check gives no answer, going on")) == 1


def test_an_operator_that_is_back_is_heard_again(check: Site) -> None:
    now = 0.0
    client = CancellationClient(check.url + PATH, "hunter2", UID, log_event=lambda *_, **__: None, clock=lambda: now)
    check.answer = lambda _request: Reply(503)
    pauses = []
    for _ in range(6):
        assert client.stop_reason() is None
        pauses.append(client._next_request - now)
        seen = len(check.requests)
        assert client.stop_reason() is None
        assert len(check.requests) == seen
        now = client._next_request
    assert pauses == [5, 10, 20, 40, 60, 60]
    check.answer = lambda _request: says(True)
    assert client.stop_reason() == "the run is cancelled"
    check.answer = lambda _request: Reply(503)
    client.stop_reason()
    assert client._next_request - now == 5


def test_it_asks_once_a_second_at_most(check: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "INTERVAL", 1.0)
    now = 0.0
    client = CancellationClient(check.url + PATH, "hunter2", UID, log_event=lambda *_, **__: None, clock=lambda: now)
    for _ in range(30):
        client.stop_reason()
        now += 0.1
    assert len(check.requests) == 3
    client.stop_reason(ask_now=True)
    client.stop_reason(ask_now=True)
    assert len(check.requests) == 5


def test_a_kept_connection_that_was_closed_is_no_missing_answer() -> None:
    """Each answer is followed by a hang-up that HTTP/1.1 does not announce."""
    told_of: list[str] = []
    served = 0
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)

        def serve() -> None:
            nonlocal served
            for _ in range(2):
                connection, _peer = server.accept()
                connection.recv(65_536)
                body = json.dumps({"id": UID, "cancelled": served > 0}).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                served += 1
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}{PATH}"
        client = CancellationClient(url, "t", UID, log_event=lambda *_, **more: told_of.append(str(more)))
        assert client.stop_reason() is None
        assert client.stop_reason(ask_now=True) == "the run is cancelled"
        thread.join(5)
    assert told_of == []


def test_a_proxy_for_the_source_is_not_asked_for_the_operator(
    bench: Bench, check: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    check.answer = lambda _request: says(True)
    (bench.workspace / "a.csv").write_text("id\n1\n")
    assert_stopped(
        bench.run("fetch", {"files": {"path": "a.csv"}}, **told(check)), "the run is cancelled, stopped after 0 rows", 0
    )


def test_without_a_token_nobody_is_asked(bench: Bench, site: Site, check: Site) -> None:
    site.answer = ten
    assert bench.run("fetch", http(site), limit=5, cancellation_url=check.url + PATH).code == 0
    assert check.requests == []


def test_sigterm_while_asking_is_a_sigterm(bench: Bench, site: Site, check: Site) -> None:
    reached, release = threading.Event(), threading.Event()

    def answer(_request: Request) -> Reply:
        reached.set()
        release.wait(30)
        return says(True)

    check.answer = answer
    process = spawn(bench.env("fetch", http(site), **told(check)))
    assert reached.wait(30)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    release.set()
    assert process.returncode == 143, output


def test_the_process_ends_well_and_says_that_it_was_cancelled(bench: Bench, site: Site, check: Site) -> None:
    check.answer = lambda _request: says(True)
    process = spawn(bench.env("fetch", http(site), **told(check)))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "hunter2" not in output
    last = json.loads(output.splitlines()[-1])
    assert (last["event"], last["outcome"], last["exit_code"]) == ("stage ended", "cancelled", 0)
