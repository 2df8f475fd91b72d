"""The server's certificate: made once for all replicas, renewed in time, changed under open connections, or given."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from tests.fakes.cluster import Call, FakeCluster

from ingestrun.controller import main
from ingestrun.controller.http import shared_secret, tls
from ingestrun.controller.http.server import ApiServer, RouteTable
from ingestrun.controller.http.tls import CA_CERTIFICATE, CERTIFICATE, KEY, GivenCertificate, OwnCertificate, names_for
from ingestrun.kube.errors import Conflict, Forbidden, KubeError
from ingestrun.model import contract
from ingestrun.worker.cancellation import CancellationClient

URL = "https://ingestrun-operator.ingestrun-system.svc:8090"
DAY = timedelta(days=1)


class Replica:
    """One replica's certificate; `now` is the API server's time."""

    def __init__(self, cluster: FakeCluster, *, url: str = URL, alone: bool = False) -> None:
        self.now = datetime.now(UTC)
        self.own = OwnCertificate(cluster, namespace="default", url=url, clock=lambda: self.now, alone=alone)


def a_cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.user_apply_secret(tls.SECRET_NAME)
    return cluster


def stored(cluster: FakeCluster, field: str) -> bytes:
    return base64.b64decode(cluster._find("Secret", "default", tls.SECRET_NAME)["data"][field])


def served(cluster: FakeCluster) -> x509.Certificate:
    return x509.load_pem_x509_certificate(stored(cluster, CERTIFICATE))


def names_in(certificate: x509.Certificate) -> set[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))}


# --- the Secret


async def test_the_first_replica_makes_it_and_all_serve_it() -> None:
    cluster = a_cluster()
    first, second = Replica(cluster), Replica(cluster)
    assert first.own.ca_pem is None
    await first.own.refresh()
    await second.own.refresh()
    assert len(cluster.calls("update", "secrets")) == 1
    assert first.own.ca_pem == second.own.ca_pem == stored(cluster, CA_CERTIFICATE).decode()
    assert "PRIVATE" not in (first.own.ca_pem or "")


async def test_two_replicas_that_race_end_with_the_same_ca() -> None:
    cluster = a_cluster()
    gate, waiting = asyncio.Event(), 0

    async def both_have_read(call: Call) -> None:
        nonlocal waiting
        if call.verb == "update" and call.stage == "before":
            waiting += 1
            if waiting >= 2:
                gate.set()
            await gate.wait()

    cluster.on_call = both_have_read
    first, second = Replica(cluster), Replica(cluster)
    await asyncio.gather(first.own.refresh(), second.own.refresh())
    assert sorted(call.outcome for call in cluster.calls("update", "secrets")) == ["Conflict", "ok"]
    assert first.own.ca_pem == second.own.ca_pem


async def test_it_is_renewed_with_a_third_of_its_life_left_and_the_ca_stays() -> None:
    cluster = a_cluster()
    replica = Replica(cluster)
    await replica.own.refresh()
    first, ca = served(cluster), stored(cluster, CA_CERTIFICATE)
    replica.now += 58 * DAY
    await replica.own.refresh()
    assert served(cluster) == first
    replica.now += 3 * DAY
    await replica.own.refresh()
    assert served(cluster).serial_number != first.serial_number
    assert served(cluster).not_valid_after_utc > first.not_valid_after_utc + 50 * DAY
    assert stored(cluster, CA_CERTIFICATE) == ca


async def test_the_cas_certificate_is_renewed_and_the_old_one_still_verifies() -> None:
    """Pods that were told of it five years ago do not matter; those of the day before do."""
    cluster = a_cluster()
    replica = Replica(cluster)
    await replica.own.refresh()
    old = x509.load_pem_x509_certificate(stored(cluster, CA_CERTIFICATE))
    replica.now += 1830 * DAY
    await replica.own.refresh()
    new = x509.load_pem_x509_certificate(stored(cluster, CA_CERTIFICATE))
    assert new.not_valid_after_utc > old.not_valid_after_utc + 1800 * DAY
    for authority in (old, new):
        served(cluster).verify_directly_issued_by(authority)
    assert (replica.own.ca_pem or "").encode() == stored(cluster, CA_CERTIFICATE)


async def test_it_is_for_the_name_that_pods_use_and_for_a_port_forward() -> None:
    cluster = a_cluster()
    await Replica(cluster).own.refresh()
    svc = "ingestrun-operator.ingestrun-system"
    local = {"localhost", "127.0.0.1", "::1"}
    assert names_in(served(cluster)) == {svc, f"{svc}.svc", f"{svc}.svc.cluster.local"} | local
    assert names_for("https://10.0.0.7:8443/base") == sorted({"10.0.0.7"} | local)


async def test_another_name_is_added_while_two_replicas_differ() -> None:
    cluster = a_cluster()
    old, new = Replica(cluster), Replica(cluster, url="https://ingest.example.org")
    for replica in (old, new, old, new):
        await replica.own.refresh()
    assert len(cluster.calls("update", "secrets")) == 2
    assert {"ingest.example.org", "ingestrun-operator.ingestrun-system.svc"} <= names_in(served(cluster))
    new.now += 61 * DAY
    await new.own.refresh()
    assert names_in(served(cluster)) == set(names_for("https://ingest.example.org"))


@pytest.mark.parametrize("data", [{"tls.crt": b"x", "tls.key": b"y"}, {"ca.crt": b"x", "ca.key": b"y"}])
async def test_what_is_not_the_operators_own_is_left_alone(data: dict[str, bytes]) -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(tls.SECRET_NAME, **{k: base64.b64encode(v).decode() for k, v in data.items()})
    replica = Replica(cluster)
    with pytest.raises(KubeError, match="not the operator's own CA"):
        await replica.own.refresh()
    assert cluster.calls("update", "secrets") == []
    assert replica.own.ca_pem is None


async def test_a_served_certificate_that_was_damaged_is_made_anew() -> None:
    cluster = a_cluster()
    replica = Replica(cluster)
    await replica.own.refresh()
    ca = stored(cluster, CA_CERTIFICATE)
    secret = cluster._find("Secret", "default", tls.SECRET_NAME)
    damaged = {**secret["data"], CERTIFICATE: base64.b64encode(b"nonsense").decode()}
    cluster.user_apply_secret(tls.SECRET_NAME, **damaged)
    await replica.own.refresh()
    served(cluster).verify_directly_issued_by(x509.load_pem_x509_certificate(ca))


async def test_without_the_secret_only_a_process_alone_makes_one() -> None:
    cluster = FakeCluster()
    cluster.fail_next("get", "secrets", Forbidden("may not"), times=9)
    shared, alone = Replica(cluster), Replica(cluster, alone=True)
    assert not await shared.own.try_refresh()
    assert shared.own.ca_pem is None
    await alone.own.refresh()
    made = alone.own.ca_pem
    assert made
    await alone.own.refresh()
    assert alone.own.ca_pem == made


async def test_a_secret_that_never_holds_still_is_given_up() -> None:
    cluster = a_cluster()
    cluster.fail_next("update", "secrets", Conflict("changed"), times=99)
    with pytest.raises(Conflict):
        await Replica(cluster).own.refresh()


# --- the server


class Hello(RouteTable):
    def routes(self) -> Iterable[web.RouteDef]:
        return [web.get("/{path:.*}", self._hello)]

    async def _hello(self, _: web.Request) -> web.Response:
        return web.json_response({"id": "u", "cancelled": True})


@asynccontextmanager
async def serving(certificate: tls.ServerCertificate) -> AsyncIterator[int]:
    server = ApiServer(routes=[Hello()], certificate=certificate)
    port = await server.serve(0, "127.0.0.1")
    try:
        yield port
    finally:
        await server.close()


def strict(ca: str | None) -> ssl.SSLContext:
    """A client that verifies as Python 3.13 does by default."""
    context = ssl.create_default_context(cadata=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, ca: str | None) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=strict(ca), server_hostname="localhost"))

    async def ask(self) -> bytes:
        self.writer.write(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await self.reader.readexactly(int(length.split(b":")[1]))
        return head.split(b"\r\n")[0]

    @property
    def serial(self) -> int:
        found: Any = self.writer.get_extra_info("ssl_object").getpeercert()
        return int(found["serialNumber"], 16)


async def test_a_new_certificate_is_served_and_open_connections_go_on() -> None:
    cluster = a_cluster()
    replica = Replica(cluster)
    async with serving(replica.own) as port:
        before = await Client.connect(port, replica.own.ca_pem)
        assert await before.ask() == b"HTTP/1.1 200 OK"
        first = served(cluster).serial_number
        cluster.user_apply_secret(tls.SECRET_NAME, **renewed(cluster))
        await replica.own.refresh()
        assert served(cluster).serial_number != first
        after = await Client.connect(port, replica.own.ca_pem)
        assert (before.serial, after.serial) == (first, served(cluster).serial_number)
        for client in (before, after, before):
            assert await client.ask() == b"HTTP/1.1 200 OK"


def renewed(cluster: FakeCluster) -> dict[str, str]:
    """The Secret as another replica leaves it that has renewed the certificate."""
    authority = tls._Authority.read({k: stored(cluster, k) for k in (CA_CERTIFICATE, tls.CA_KEY)})
    content = authority.content(names_for(URL), datetime.now(UTC))
    return {field: base64.b64encode(value).decode() for field, value in content.items()}


async def test_what_another_replica_has_stored_is_served_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_secret, "REFRESH_SECONDS", 0.05)
    cluster = a_cluster()
    replica = Replica(cluster)
    async with serving(replica.own) as port:
        cluster.user_apply_secret(tls.SECRET_NAME, **renewed(cluster))
        began = time.monotonic()
        while (await Client.connect(port, replica.own.ca_pem)).serial != served(cluster).serial_number:
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.02)


async def test_a_client_with_another_ca_or_another_name_does_not_connect() -> None:
    replica, other = Replica(a_cluster()), Replica(a_cluster())
    await other.own.refresh()
    async with serving(replica.own) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"signature|issuer|self-signed"):
            await Client.connect(port, other.own.ca_pem)
        context = strict(replica.own.ca_pem)
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="example.org")


async def test_the_built_in_worker_verifies_by_the_ca_that_its_job_names() -> None:
    replica, other = Replica(a_cluster()), Replica(a_cluster())
    await other.own.refresh()
    lines: list[dict[str, Any]] = []

    def client(port: int, ca: str) -> CancellationClient:
        env = {
            contract.ENV_CANCELLATION_URL: f"https://localhost:{port}/x",
            contract.ENV_CANCELLATION_TOKEN: "t",
            contract.ENV_CANCELLATION_CA: ca,
            contract.ENV_RUN_UID: "u",
        }
        made = CancellationClient.from_env(env, lambda event, **fields: lines.append({"event": event, **fields}))
        assert made is not None
        return made

    async with serving(replica.own) as port:
        good = client(port, replica.own.ca_pem or "")
        assert await asyncio.to_thread(good.stop_reason) == "the run is cancelled"
        assert lines == []
        for bad in (other.own.ca_pem or "", "", "no PEM"):
            assert await asyncio.to_thread(client(port, bad).stop_reason) is None
        assert len(lines) == 3
        assert all("gives no answer" in line["event"] for line in lines)
        assert "CERTIFICATE_VERIFY_FAILED" in lines[0]["why"]


# --- given certificates


async def made_by_hand(folder: Path) -> None:
    cluster = a_cluster()
    await Replica(cluster).own.refresh()
    for field in (CA_CERTIFICATE, CERTIFICATE, KEY):
        (folder / field).write_bytes(stored(cluster, field))


async def test_a_given_certificate_is_served_and_changed_when_its_files_change(tmp_path: Path) -> None:
    await made_by_hand(tmp_path)
    given = GivenCertificate(tmp_path)
    async with serving(given) as port:
        first = given.ca_pem
        assert first == (tmp_path / CA_CERTIFICATE).read_text()
        assert await (await Client.connect(port, first)).ask() == b"HTTP/1.1 200 OK"
        await made_by_hand(tmp_path)
        assert await given.try_refresh()
        assert given.ca_pem != first
        assert await (await Client.connect(port, given.ca_pem)).ask() == b"HTTP/1.1 200 OK"
        # Half written: the key is not the certificate's. The last pair stays in use.
        good = given.ca_pem
        key = (tmp_path / KEY).read_bytes()
        await made_by_hand(tmp_path)
        (tmp_path / KEY).write_bytes(key)
        assert not await given.try_refresh()
        assert given.ca_pem == good
        assert await (await Client.connect(port, good)).ask() == b"HTTP/1.1 200 OK"


async def test_a_given_certificate_of_a_known_ca_tells_pods_of_none(tmp_path: Path) -> None:
    await made_by_hand(tmp_path)
    (tmp_path / CA_CERTIFICATE).unlink()
    given = GivenCertificate(tmp_path)
    assert given.ca_pem is None
    assert await given.try_refresh()
    assert given.ca_pem == ""


async def test_files_that_come_later_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "RETRY_SECONDS", 0.05)
    given = GivenCertificate(tmp_path)
    await given.open()
    assert given.ca_pem is None
    await made_by_hand(tmp_path)
    began = time.monotonic()
    while given.ca_pem is None:
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.02)
    await given.close()


# --- settings


def test_a_url_that_no_pod_could_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deployed, TLS is on unless it was switched off."""
    monkeypatch.setenv("INGESTRUN_API_URL", "http://ingestrun-operator.ingestrun-system.svc:8090")
    assert main.main(["run"]) == 2
    assert "INGESTRUN_API_URL is http://, and the server speaks TLS" in capsys.readouterr().err
