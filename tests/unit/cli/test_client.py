"""The client against a real HTTP server: pages, watches, warnings, new credentials, and errors in kubectl's words."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
from pykube import KubeConfig
from tests.unit.cli.support import Json, run_body

from ingestrun.cli.client import Api, WatchExpired
from ingestrun.cli.errors import CliError, ExitCode, ServerError
from ingestrun.cli.follow import Follower
from ingestrun.cli.kubeconfig import Access, PrivateFolder

SOURCES: Final = str(Path(__file__).parents[3] / "operator")
GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}


@dataclass
class Answer:
    """An answer of the server."""

    body: Any = None
    code: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    lines: tuple[Any, ...] | None = None
    """A watch's lines, in place of a body."""


@dataclass
class Asked:
    """A request that the server was sent."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: str


class Server:
    """An API server that gives the answers in turn, and notes what it is asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[Asked] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                parts, length = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                body = self.rfile.read(length).decode()
                server.asked.append(Asked(self.command, parts.path, query, dict(self.headers.items()), body))
                answer = server.answers.pop(0)
                lines = answer.lines if answer.lines is not None else [answer.body]
                content = "".join(json.dumps(line) + "\n" for line in lines).encode()
                self.send_response(answer.code)
                for key, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PATCH = do_POST = answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def access(
    url: str, token: str = "first", renew: Callable[[], Access] | None = None, user: Json | None = None
) -> Access:
    config = KubeConfig(
        {
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "c", "user": {"token": token, **(user or {})}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
            "current-context": "c",
        }
    )
    return Access(config=config, namespace="geo", folder=PrivateFolder(), renew=renew)


def page(*names: str, version: str = "5", following: str = "") -> Answer:
    meta = {"resourceVersion": version, **({"continue": following} if following else {})}
    return Answer({"items": [run_body(name) for name in names], "metadata": meta})


def change(name: str, version: str = "6", kind: str = "MODIFIED") -> Json:
    return {"type": kind, "object": run_body(name, resourceVersion=version)}


def test_a_list_is_read_page_by_page_and_tells_the_servers_time(server: Server) -> None:
    server.answers = [page("a", following="more"), page("b", version="7")]
    server.answers[1].headers["Date"] = "Sat, 28 Nov 2026 12:00:00 GMT"
    listed = Api(access(server.url)).runs("geo", selector="team=geo")
    assert [item["metadata"]["name"] for item in listed.items] == ["a", "b"]
    assert listed.resource_version == "7"
    first, second = server.asked
    assert first.path == "/apis/ingestrun.dev/v1alpha1/namespaces/geo/ingestruns"
    assert (first.query, second.query["continue"]) == ({"labelSelector": "team=geo", "limit": "500"}, "more")
    assert first.headers["User-Agent"].startswith("kubectl-ingestrun/"), "the field manager"
    assert first.headers["Authorization"] == "Bearer first"


def test_a_list_that_took_too_long_is_begun_anew(server: Server) -> None:
    server.answers = [page("a", following="more"), Answer(GONE, 410), page("a", "b")]
    listed = Api(access(server.url)).runs(None)
    assert [item["metadata"]["name"] for item in listed.items] == ["a", "b"]
    assert server.asked[0].path == "/apis/ingestrun.dev/v1alpha1/ingestruns"
    assert "continue" not in server.asked[2].query


def test_a_patch_is_a_merge_that_refuses_unknown_fields(server: Server) -> None:
    server.answers = [Answer(run_body()), Answer(run_body())]
    api = Api(access(server.url))
    api.patch("geo", "flights", {"spec": {"cancel": True}})
    api.patch("geo", "flights", {"spec": {"cancel": True}}, dry_run=True)
    first, second = server.asked
    assert (first.method, first.headers["Content-Type"]) == ("PATCH", "application/merge-patch+json")
    assert (first.query, json.loads(first.body)) == ({"fieldValidation": "Strict"}, {"spec": {"cancel": True}})
    assert second.query == {"fieldValidation": "Strict", "dryRun": "All"}


def test_credentials_that_have_expired_are_renewed_once(server: Server) -> None:
    refused = Answer({"kind": "Status", "reason": "Unauthorized", "message": "Unauthorized"}, 401)
    server.answers = [refused, page("a"), refused, refused]
    renewed: list[int] = []

    def renew() -> Access:
        renewed.append(1)
        return access(server.url, "second", renew)

    api = Api(access(server.url, renew=renew))
    assert len(api.runs("geo").items) == 1
    assert [it.headers["Authorization"] for it in server.asked] == ["Bearer first", "Bearer second"]
    with pytest.raises(ServerError) as still:
        api.runs("geo")
    assert (still.value.code, len(renewed)) == (ExitCode.FORBIDDEN, 2)


def test_warnings_of_the_server_are_printed_once_each(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    warned = page("a")
    warned.headers["Warning"] = '299 - "say \\"cancel\\"", 299 - "another"'
    server.answers = [warned, warned]
    api = Api(access(server.url))
    api.runs("geo")
    api.runs("geo")
    assert capsys.readouterr().err == 'Warning: say "cancel"\nWarning: another\n'


def test_another_user_is_impersonated(server: Server) -> None:
    server.answers = [page(), page()]
    Api(access(server.url), user="carol", group="ops").runs("geo")
    Api(access(server.url, user={"as": "dana", "as-groups": ["one"]})).runs("geo")
    assert [(it.headers["Impersonate-User"], it.headers["Impersonate-Group"]) for it in server.asked] == [
        ("carol", "ops"),
        ("dana", "one"),
    ]
    with pytest.raises(CliError, match="several groups"):
        Api(access(server.url, user={"as": "dana", "as-groups": ["one", "two"]}))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer({"kind": "Status", "reason": "Forbidden", "message": "no"}, 403), "Error from server (Forbidden): no"),
        (Answer("a proxy's page", 502), 'Error from server: "a proxy\'s page"'),
    ],
)
def test_a_refusal_is_raised_in_kubectls_words(server: Server, answer: Answer, text: str) -> None:
    server.answers = [answer]
    with pytest.raises(ServerError) as refused:
        Api(access(server.url)).run("geo", "flights")
    assert str(refused.value) == text


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(CliError) as refused:
        Api(access(f"http://127.0.0.1:{port}")).runs("geo")
    assert str(refused.value).startswith(f"The connection to the server 127.0.0.1:{port} was refused - did you specify")
    assert refused.value.code is ExitCode.ERROR


def test_a_server_that_does_not_answer() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(CliError) as late:
            Api(access(f"http://127.0.0.1:{silent.getsockname()[1]}"), timeout=0.05).runs("geo")
    assert late.value.code is ExitCode.TIMED_OUT


def test_a_follower_lists_watches_and_lists_anew_when_its_version_is_too_old(server: Server) -> None:
    server.answers = [
        page("a", "b"),
        Answer(lines=(change("a"), change("b", "7", "DELETED"))),
        Answer(lines=({"type": "ERROR", "object": GONE},)),
        page("c", version="20"),
        Answer(GONE, 410),
        page("c", version="21"),
    ]
    follower = Follower(Api(access(server.url)), "geo")
    assert [(kind, run.name) for kind, run in follower.changes(9)] == [("MODIFIED", "a"), ("DELETED", "b")]
    assert [run.name for run in follower.runs.values()] == ["a"]
    assert [(kind, run.name) for kind, run in follower.changes(9)] == [("DELETED", "a"), ("MODIFIED", "c")]
    assert [(kind, run.name) for kind, run in follower.changes(9)] == [("MODIFIED", "c")]
    watches = [it.query for it in server.asked if "watch" in it.query]
    assert [query["resourceVersion"] for query in watches] == ["5", "7", "20"]


def test_a_watch_that_is_refused_is_an_error(server: Server) -> None:
    refused = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": "no"}
    server.answers = [Answer(lines=({"type": "ERROR", "object": refused},))]
    with pytest.raises(ServerError, match="Forbidden"):
        list(Api(access(server.url)).watch_runs("geo", "5", seconds=9))
    server.answers = [Answer(GONE, 410)]
    with pytest.raises(WatchExpired):
        list(Api(access(server.url)).watch_runs("geo", "5", seconds=9))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_that_is_ended_leaves_no_key_behind(number: signal.Signals, tmp_path: Path) -> None:
    key = base64.b64encode(b"key").decode()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = access(f"http://127.0.0.1:{silent.getsockname()[1]}").config.doc
        config["users"][0]["user"] = {"client-certificate-data": key, "client-key-data": key}
        (tmp_path / "config").write_text(json.dumps(config))
        folder = tmp_path / "tmp"
        folder.mkdir()
        found = {**os.environ, "KUBECONFIG": str(tmp_path / "config"), "TMPDIR": str(folder), "PYTHONPATH": SOURCES}
        with subprocess.Popen([sys.executable, "-m", "ingestrun.cli", "list"], env=found) as asking:
            silent.settimeout(60)
            connection, _ = silent.accept()
            assert list(folder.iterdir()), "its key is in a file while it asks"
            asking.send_signal(number)
            asking.wait(60)
            connection.close()
    assert asking.returncode == 128 + number
    assert list(folder.iterdir()) == []
