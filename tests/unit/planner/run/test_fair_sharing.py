"""How slots are shared: fixed cases, and rules that hold whatever the load."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.planner.run.fair_sharing import Admission, Capacity, Demand, JobLimits, Quota, admissions

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def load(uid: str, *, active: int = 0, wants: int = 1, namespace: str = "n", turn: int = 0) -> Demand:
    return Demand(uid=uid, namespace=namespace, active=active, wants=wants, turn=turn)


def capacity(caps: JobLimits, *loads: Demand, free: int | None = None) -> Capacity:
    """What there would be with these runs alone."""
    places: Counter[str] = Counter()
    for one in loads:
        places[one.namespace] += one.active
    quotas = {"n": Quota(message="exceeded quota", free=free, until=NOW)} if free is not None else {}
    return Capacity(
        caps=caps,
        run=load("", wants=0),
        others=loads,
        in_namespace=places,
        in_all=sum(places.values()),
        quotas=quotas,
    )


@pytest.mark.parametrize(
    ("caps", "loads", "given_to"),
    [
        (JobLimits(), [load("a", wants=1000)], {"a": 1000}),
        (JobLimits(in_all=10), [load("a", wants=100), load("b", wants=3)], {"a": 7, "b": 3}),
        (JobLimits(in_all=10), [load("a", active=9, wants=91), load("b", wants=3)], {"b": 1}),
        (JobLimits(in_all=10), [load("a", active=10, wants=90), load("b", wants=3)], {}),
        (JobLimits(in_all=10), [load("a", active=5, wants=9), load("b", active=2, wants=9)], {"b": 3}),
        (JobLimits(in_all=1), [load("a", turn=2), load("b", turn=1), load("c", turn=3)], {"b": 1}),
        (JobLimits(per_run=2), [load("a", active=1, wants=9), load("b", wants=1)], {"a": 1, "b": 1}),
        (JobLimits(per_namespace=2), [load("a", wants=9), load("b", wants=9, namespace="m")], {"a": 2, "b": 2}),
        (
            JobLimits(per_namespace=2, in_all=3),
            [load("a", active=2, wants=9), load("b", wants=9, namespace="m")],
            {"b": 1},
        ),
    ],
)
def test_who_gets_what(caps: JobLimits, loads: list[Demand], given_to: dict[str, int]) -> None:
    assert admissions(capacity(caps, *loads)) == given_to


def test_a_quota_that_has_refused_lets_as_many_try_as_have_gone() -> None:
    assert admissions(capacity(JobLimits(), load("big", active=5, wants=9), load("small"), free=0)) == {}
    assert admissions(capacity(JobLimits(), load("big", active=5, wants=9), load("small"), free=1)) == {"small": 1}


def told(caps: JobLimits, run: Demand, *others: Demand, needy: int | None = None, known: bool = True) -> Admission:
    base = capacity(caps, *others, load(run.uid, active=run.active, wants=0, namespace=run.namespace))
    return Capacity(
        caps=caps,
        run=run,
        others=others,
        in_namespace=base.in_namespace,
        in_all=base.in_all,
        fewest_jobs_without_pod=needy,
        synced=known,
    ).admit(run.wants)


@pytest.mark.parametrize(
    ("caps", "words"),
    [
        (JobLimits(per_run=2), "2 unfinished Jobs a run (INGESTRUN_MAX_JOBS_PER_RUN)"),
        (JobLimits(per_namespace=3), "3 unfinished Jobs in namespace n (INGESTRUN_MAX_JOBS_PER_NAMESPACE)"),
        (JobLimits(in_all=3), "3 unfinished Jobs in all (INGESTRUN_MAX_JOBS)"),
    ],
)
def test_who_is_held_is_told_by_which_limit(caps: JobLimits, words: str) -> None:
    grant = told(caps, load("a", active=2, wants=4), load("b", active=1, wants=0))
    assert (grant.number, grant.reason) == (0, "JobLimitReached")
    assert words in grant.message


def test_nothing_is_granted_before_all_jobs_are_counted_and_nobody_is_told_why() -> None:
    assert told(JobLimits(in_all=10), load("a"), known=False) == Admission(number=0)


def test_a_run_whose_pod_a_quota_refuses_comes_before_those_with_more_jobs() -> None:
    assert told(JobLimits(), load("big", active=5, wants=9), needy=1).number == 0
    assert told(JobLimits(), load("new", active=0, wants=9), needy=1).number == 1


LOADS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from("nm"), st.integers(0, 5)), min_size=1, max_size=6
).map(lambda rows: [load(f"r{i}", active=a, wants=w, namespace=n, turn=t) for i, (a, w, n, t) in enumerate(rows)])
CAPS = st.builds(JobLimits, per_run=st.integers(0, 8), per_namespace=st.integers(0, 12), in_all=st.integers(0, 20))


@given(caps=CAPS, loads=LOADS)
def test_caps_hold_no_slot_is_idle_and_nobody_with_more_goes_first(caps: JobLimits, loads: list[Demand]) -> None:
    given_to = admissions(capacity(caps, *loads))
    after = {one.uid: one.active + given_to.get(one.uid, 0) for one in loads}
    places: Counter[str] = Counter()
    for one in loads:
        places[one.namespace] += after[one.uid]

    def fits(one: Demand) -> bool:
        """Whether one slot more would be within the caps."""
        return (
            (not caps.per_run or after[one.uid] < caps.per_run)
            and (not caps.per_namespace or places[one.namespace] < caps.per_namespace)
            and (not caps.in_all or sum(after.values()) < caps.in_all)
        )

    for one in loads:
        got = given_to.get(one.uid, 0)
        assert got <= one.wants
        if got:
            assert not caps.per_run or after[one.uid] <= caps.per_run
            assert not caps.per_namespace or places[one.namespace] <= caps.per_namespace
            assert not caps.in_all or sum(after.values()) <= caps.in_all
        if got < one.wants:
            assert not fits(one), "a slot is idle that this run could use"
        for other in loads:
            short = given_to.get(other.uid, 0) < other.wants
            of_one_kind = other.namespace == one.namespace and not (caps.per_run and after[other.uid] >= caps.per_run)
            if got and short and of_one_kind:
                assert after[one.uid] <= after[other.uid] + 1, "who has more was served before who has less"


@given(caps=CAPS, loads=LOADS)
def test_each_run_sees_the_same_deal(caps: JobLimits, loads: list[Demand]) -> None:
    """Every pass decides for itself from the snapshot: together they must give what one dealer would."""
    together = admissions(capacity(caps, *loads))
    for one in loads:
        others = [other for other in loads if other.uid != one.uid]
        assert told(caps, one, *others).number == together.get(one.uid, 0)


@given(caps=CAPS, wants=st.lists(st.integers(1, 40), min_size=2, max_size=6), last=st.integers(0, 5))
def test_no_run_with_demand_starves(caps: JobLimits, wants: list[int], last: int) -> None:
    """Slots come free one by one, always of the run that has most; whoever starts is last in turn. All get done."""
    left = {f"r{i}": want for i, want in enumerate(wants)}
    active = Counter({"r0": 0})
    turns = {uid: number for number, uid in enumerate(left)}
    clock = last + len(turns)
    for _ in range(sum(wants) + 1):
        while True:
            loads = [load(uid, active=active[uid], wants=left[uid], turn=turns[uid]) for uid in left]
            dealt = admissions(capacity(caps, *loads))
            if not dealt:
                break
            uid = min(dealt)
            active[uid] += dealt[uid]
            left[uid] -= dealt[uid]
            clock += 1
            turns[uid] = clock
        assert not caps.in_all or sum(active.values()) <= caps.in_all
        waiting = [active[uid] for uid in left if left[uid]]
        if not waiting:
            return
        most = max(active, key=lambda uid: active[uid])
        assert active[most] - min(waiting) <= 1, "a run that waits has fewer than its share"
        active[most] -= 1
    raise AssertionError(f"still waiting: {left}")
