"""Names of Jobs: always valid, always the same, never shared."""

from __future__ import annotations

import re
import uuid
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.names import job_name

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
UID = "6f0c1b9e-4f4a-4f0e-8a53-0d4be2a5b7c1"

RUN_NAMES = st.from_regex(
    r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,60}[a-z0-9])?){0,3}", fullmatch=True
)
STEP_NAMES = st.sampled_from(["fetch", "publish"]) | st.builds(
    "h{}-{}".format, st.integers(1, 16), st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)
)
BATCHES = st.integers(0, 10**15)
ATTEMPTS = st.integers(0, 100)


@given(RUN_NAMES, st.uuids().map(str), BATCHES, STEP_NAMES, ATTEMPTS)
def test_a_name_is_valid_and_always_the_same(run_name: str, uid: str, batch: int, step: str, attempt: int) -> None:
    """A pod's hostname and the label job-name are made of it, so it has to be a DNS-1123 label."""
    name = job_name(run_name=run_name, run_uid=uid, batch=batch, step_name=step, attempt=attempt)

    assert len(name) <= 63
    assert LABEL.fullmatch(name)
    assert name == job_name(run_name=run_name, run_uid=uid, batch=batch, step_name=step, attempt=attempt)


@pytest.mark.parametrize("run_name", ["geo", "a" * 253, "a." * 126 + "a", "0"])
@pytest.mark.parametrize("hooks", [["h1-check", "h2-check"], [f"h1-{'x' * 62}y", f"h1-{'x' * 62}z"]])
def test_no_two_jobs_share_a_name(run_name: str, hooks: list[str]) -> None:
    places = list(product([UID, str(uuid.uuid4())], [0, 1, 10, 11, 999_999], ["fetch", *hooks, "publish"], [0, 1, 10]))
    names = {
        job_name(run_name=run_name, run_uid=uid, batch=batch, step_name=step, attempt=attempt)
        for uid, batch, step, attempt in places
    }

    assert len(names) == len(places)


def test_parts_that_run_together_are_kept_apart() -> None:
    """Batch 1, step 1-x and batch 1-1, step x would read the same; the hash is over the parts."""
    one = job_name(run_name="a", run_uid=UID, batch=1, step_name="h1-2-fetch", attempt=0)
    other = job_name(run_name="a", run_uid=UID, batch=1, step_name="h1", attempt=2)

    assert one != other


def test_a_name_tells_people_what_it_is() -> None:
    name = job_name(run_name="geo-2026-11", run_uid=UID, batch=42, step_name="publish", attempt=1)

    assert name.startswith("geo-2026-11-42-publish-1-")


def test_two_long_run_names_with_one_beginning() -> None:
    first = job_name(run_name="x" * 200 + "1", run_uid=str(uuid.UUID(int=1)), batch=0, step_name="fetch", attempt=0)
    second = job_name(run_name="x" * 200 + "2", run_uid=str(uuid.UUID(int=2)), batch=0, step_name="fetch", attempt=0)

    assert first != second
