"""Tokens of the cancellation check, and the key that the replicas share."""

from __future__ import annotations

import asyncio
import base64

import pytest
from tests.fakes.cluster import Call, FakeCluster

from ingestrun.controller.http.tokens import (
    SECRET_FIELD,
    SECRET_NAME,
    CheckKey,
    ForeignTokenError,
    NoTokenError,
    TokenError,
    issue,
    verify,
)
from ingestrun.kube.errors import Conflict, Forbidden, KubeError, NotFound, Unavailable
from ingestrun.kube.protocol import RunKey

KEY = b"k" * 32
RUN = RunKey(namespace="default", name="geo")
UID = "6f0c1e1a-2b6d-4c7e-9a55-0d3f6b1c2d4e"
OTHER_UID = "00000000-2b6d-4c7e-9a55-0d3f6b1c2d4e"
NOW = 1_800_000_000.0
TOKEN = issue(KEY, RUN, uid=UID, expiry=int(NOW) + 60)


def test_a_token_is_good_for_its_run_until_it_expires() -> None:
    assert verify(KEY, RUN, TOKEN, now=NOW) == UID
    assert verify(KEY, RUN, TOKEN, now=NOW + 59.9) == UID
    with pytest.raises(NoTokenError, match="expired"):
        verify(KEY, RUN, TOKEN, now=NOW + 60)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        (RunKey(namespace="default", name="geo2"), KEY),
        (RunKey(namespace="other", name="geo"), KEY),
        (RUN, b"l" * 32),
    ],
)
def test_not_for_another_run_nor_with_another_key(run: RunKey, key: bytes) -> None:
    with pytest.raises(ForeignTokenError) as raised:
        verify(key, run, TOKEN, now=NOW)
    assert TOKEN not in str(raised.value)


def test_namespace_and_name_can_not_run_into_each_other() -> None:
    token = issue(KEY, RunKey(namespace="a", name="b-c"), uid=UID, expiry=int(NOW) + 60)
    with pytest.raises(ForeignTokenError):
        verify(KEY, RunKey(namespace="a-b", name="c"), token, now=NOW)


@pytest.mark.parametrize("index", range(4))
def test_no_part_of_a_token_can_be_changed(index: int) -> None:
    parts = TOKEN.split(".")
    parts[index] = {
        0: "v2",
        1: str(int(NOW) + 10**6),
        2: OTHER_UID,
        3: ("B" if parts[3][0] == "A" else "A") + parts[3][1:],
    }[index]
    with pytest.raises(TokenError):
        verify(KEY, RUN, ".".join(parts), now=NOW)


@pytest.mark.parametrize(
    "token", ["", "x", "v1..", f"{TOKEN} ", f"{TOKEN}\n", TOKEN[:-1], TOKEN + "=", "v1.٣." + TOKEN]
)
def test_what_is_no_token_is_told_so(token: str) -> None:
    with pytest.raises(NoTokenError):
        verify(KEY, RUN, token, now=NOW)


# --- the key


def check_key(cluster: FakeCluster, *, alone: bool = False) -> CheckKey:
    return CheckKey(cluster, namespace="default", alone=alone)


async def test_an_empty_secret_is_filled_once_and_read_from_then_on() -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(SECRET_NAME)
    first, second = check_key(cluster), check_key(cluster)
    await first.refresh()
    await second.refresh()
    assert first.value is not None
    assert len(first.value) == 32
    assert second.value == first.value
    assert len(cluster.calls("update", "secrets")) == 1


async def test_two_replicas_that_race_end_with_the_same_key() -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(SECRET_NAME)
    gate, waiting = asyncio.Event(), 0

    async def both_have_read(call: Call) -> None:
        nonlocal waiting
        if call.verb == "update" and call.stage == "before":
            waiting += 1
            if waiting >= 2:
                gate.set()
            await gate.wait()

    cluster.on_call = both_have_read
    keys = [check_key(cluster), check_key(cluster)]
    await asyncio.gather(*(key.refresh() for key in keys))
    assert sorted(call.outcome for call in cluster.calls("update", "secrets")) == ["Conflict", "ok"]
    assert keys[0].value == keys[1].value
    assert keys[0].value is not None


async def test_a_key_that_was_deleted_is_made_anew_and_old_tokens_end() -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(SECRET_NAME)
    key = check_key(cluster)
    await key.refresh()
    before = key.value
    assert before is not None
    token = issue(before, RUN, uid=UID, expiry=int(NOW) + 60)
    cluster.user_apply_secret(SECRET_NAME)
    await key.refresh()
    assert key.value not in (None, before)
    assert key.value is not None
    with pytest.raises(ForeignTokenError, match="replaced"):
        verify(key.value, RUN, token, now=NOW)


async def test_a_key_of_ones_own_is_taken_and_a_short_one_refused() -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(SECRET_NAME, **{SECRET_FIELD: base64.b64encode(b"m" * 40).decode()})
    key = check_key(cluster)
    await key.refresh()
    assert key.value == b"m" * 40
    for bad in (base64.b64encode(b"short").decode(), "no base64!"):
        cluster.user_apply_secret(SECRET_NAME, **{SECRET_FIELD: bad})
        with pytest.raises(KubeError, match="fewer than 32 bytes") as raised:
            await key.refresh()
        assert bad not in str(raised.value)
    assert key.value == b"m" * 40
    assert cluster.calls("update", "secrets") == []


@pytest.mark.parametrize("error", [NotFound("no such Secret"), Forbidden("may not")])
async def test_without_the_secret_only_a_process_alone_makes_a_key(error: KubeError) -> None:
    cluster = FakeCluster()
    cluster.fail_next("get", "secrets", error, times=3)
    shared, alone = check_key(cluster), check_key(cluster, alone=True)
    with pytest.raises(type(error)):
        await shared.refresh()
    assert not await shared.try_refresh()
    assert shared.value is None
    await alone.refresh()
    made = alone.value
    assert made is not None
    await alone.refresh()
    assert alone.value == made


async def test_a_known_key_outlives_an_api_server_that_does_not_answer() -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(SECRET_NAME)
    key = check_key(cluster, alone=True)
    await key.refresh()
    known = key.value
    cluster.fail_next("get", "secrets", Unavailable("down"))
    assert not await key.try_refresh()
    assert key.value == known


async def test_a_secret_that_never_holds_still_is_given_up() -> None:
    cluster = FakeCluster()
    cluster.user_apply_secret(SECRET_NAME)
    cluster.fail_next("update", "secrets", Conflict("changed"), times=99)
    with pytest.raises(Conflict):
        await check_key(cluster).refresh()
