"""Does to the runs of a wave what was planned: creates, cancels at the planned moments, repeats, takes back, kills."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kubernetes import client

from tests.api.conftest import Cluster
from tests.race.account import Operator
from tests.race.generator import RunPlan, Signal

Json = dict[str, Any]


class Timers:
    """Calls functions at their time, on a pool; what they raise is kept, so that no failure is silent."""

    def __init__(self, workers: int = 16) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve, daemon=True, name="timers")
        self._thread.start()

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Call it so many seconds from now."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + max(0.0, seconds), next(self._count), function))
            self._changed.notify()

    def close(self) -> None:
        """Drop what is due later, wait for what is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                _, _, function = heapq.heappop(self._due)
            self._pool.submit(self._call, function)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            self.errors.append(error)


@dataclass
class _State:
    plan: RunPlan
    namespace: str
    uid: str = ""
    fired: bool = False
    awaits_fallback: bool = False
    cancelled_seen: bool = False


class Traffic:
    """One wave's requests. `signal` is what the observer calls."""

    def __init__(self, cluster: Cluster, operator: Operator, timers: Timers) -> None:
        self._cluster = cluster
        self._operator = operator
        self._timers = timers
        self._states: dict[str, _State] = {}
        self._early: dict[str, list[Signal]] = {}
        self._lock = threading.Lock()
        self._operator_lock = threading.Lock()
        self.refused: Counter[int] = Counter()
        self.pending = 0
        """Calls that are planned and not yet done; a fallback counts until its run's moment has come."""

    def submit(self, plan: RunPlan, namespace: str) -> None:
        """Have the run created at its time, and all that follows."""
        self._later(plan.start, lambda: self._create(plan, namespace))

    def signal(self, uid: str, seen: Signal) -> None:
        """Something was seen of a run."""
        with self._lock:
            state = self._states.get(uid)
            if state is None:
                self._early.setdefault(uid, []).append(seen)
                return
        self._react(state, seen)

    def uids(self) -> dict[str, RunPlan]:
        """The runs that were created so far."""
        with self._lock:
            return {uid: state.plan for uid, state in self._states.items()}

    def _later(self, seconds: float, function: Callable[[], None]) -> None:
        with self._lock:
            self.pending += 1

        def run() -> None:
            try:
                function()
            finally:
                with self._lock:
                    self.pending -= 1

        self._timers.after(seconds, run)

    def _create(self, plan: RunPlan, namespace: str) -> None:
        cancel = plan.cancel
        spec = dict(plan.spec)
        at_creation = cancel.signal is None and cancel.moment.value == "at creation"
        if at_creation:
            spec["cancel"] = True
            spec["cancellation"] = self._cancellation(plan, cancel.reason)
        made = self._cluster.create_run(namespace, spec, name=plan.name)
        state = _State(plan=plan, namespace=namespace, uid=made["metadata"]["uid"], fired=at_creation)
        with self._lock:
            self._states[state.uid] = state
            early = self._early.pop(state.uid, [])
        if at_creation:
            self._follow_up(state)
        elif cancel.signal is None:
            self._fire(state, cancel.delay)
        else:
            with self._lock:
                state.awaits_fallback = not state.fired
                self.pending += state.awaits_fallback
            self._timers.after(cancel.fallback, lambda: self._fire(state, 0))
            if plan.suspend_at is not None:
                self._later(plan.suspend_at, lambda: self._patch(state, {"suspend": True}))
        for seen in early:
            self._react(state, seen)

    def _react(self, state: _State, seen: Signal) -> None:
        cancel = state.plan.cancel
        if seen.kind == "cancelled" and not state.cancelled_seen:
            state.cancelled_seen = True
            if cancel.clear_after is not None:
                self._later(cancel.clear_after, lambda: self._patch(state, {"cancel": None, "cancellation": None}))
        if cancel.signal is not None and cancel.signal.matches(seen):
            self._fire(state, cancel.delay)
        elif seen.kind in ("succeeded", "failed") and seen.stage is None:
            self._fire(state, 0)  # its moment will not come any more; to be refused

    def _fire(self, state: _State, delay: float) -> None:
        with self._lock:
            if state.fired:
                return
            state.fired = True
            fallback, state.awaits_fallback = state.awaits_fallback, False
        cancel = state.plan.cancel
        lead = max(0.0, -cancel.kill) if cancel.kill is not None else 0.0
        if cancel.kill is not None:
            self._later(delay + lead + cancel.kill, lambda: self._kill(cancel.down_seconds))
        self._later(delay + lead, lambda: self._cancel(state))
        if fallback:
            with self._lock:
                self.pending -= 1

    def _cancel(self, state: _State) -> None:
        plan = state.plan
        spec: Json = {"cancel": True, "cancellation": self._cancellation(plan, plan.cancel.reason)}
        if plan.cancel.resume:
            spec["suspend"] = None
        self._patch(state, spec)
        self._follow_up(state)

    def _follow_up(self, state: _State) -> None:
        cancel, after = state.plan.cancel, 0.0
        for number, pause in enumerate(cancel.repeats):
            after += pause
            again = {"cancel": True}
            if cancel.clear_after is None and not cancel.clear_at_once:
                reason = f"{cancel.reason}, again {number}"
                repeat: Json = {**again, "cancellation": self._cancellation(state.plan, reason)}
            else:
                repeat = again
            self._later(after, lambda repeat=repeat: self._patch(state, repeat))  # type: ignore[misc]
        if cancel.clear_at_once:
            # Before the operator could see it, more often than not: such a run goes on, to an end of its own.
            self._patch(state, {"cancel": None, "cancellation": None, "suspend": None})

    def _cancellation(self, plan: RunPlan, reason: str) -> Json:
        return {"reason": reason, **({"policy": plan.cancel.policy} if plan.cancel.policy else {})}

    def _patch(self, state: _State, spec: Json) -> None:
        try:
            self._cluster.patch_spec(state.namespace, state.plan.name, **spec)
        except client.ApiException as error:
            # A run that has ended refuses a cancel; the checker holds that against its history.
            if error.status != 422:
                raise
            self.refused[422] += 1

    def _kill(self, down_seconds: float) -> None:
        # A successor waits for the lease: whose cancel comes meanwhile meets an operator that is down, as was planned.
        if not self._operator_lock.acquire(blocking=not self._operator.lease):
            return
        try:
            self._operator.kill()
            time.sleep(down_seconds)
            self._operator.start()
        finally:
            self._operator_lock.release()
