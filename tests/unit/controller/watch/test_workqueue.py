"""The keyed queue and what runs behind it: one pass at a time for a key, cancels first, nothing lost."""

from __future__ import annotations

import asyncio

from ingestrun.controller.reconcile.recorder import EventQueue
from ingestrun.controller.watch.workqueue import PATIENT, WorkQueue


async def test_one_pass_at_a_time_for_a_key_and_requests_in_between_are_one() -> None:
    passes: list[str] = []
    gate = asyncio.Event()

    async def handle(key: str, trigger: str) -> None:
        passes.append(trigger)
        await gate.wait()

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=4)
    for trigger in ("first", "second", "third"):
        queue.add("run", trigger)
        await asyncio.sleep(0)
    assert passes == ["first"]
    gate.set()
    await queue.idle()
    assert passes == ["first", "third"]


async def test_urgent_keys_do_not_queue_behind_others() -> None:
    order: list[str] = []
    gate = asyncio.Event()

    async def handle(key: str, _: str) -> None:
        order.append(key)
        await gate.wait()

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=1, urgent=lambda key: key.startswith("cancel"))
    for key in ("a", "b", "c", "cancel-1", "cancel-2"):
        queue.add(key, "run")
        await asyncio.sleep(0)
    gate.set()
    await queue.idle()
    assert order == ["a", "cancel-1", "cancel-2", "b", "c"]


async def test_a_pass_that_fails_is_taken_again_and_delays_do_not_hold_up_a_request() -> None:
    passes: list[str] = []
    again = asyncio.Event()

    async def handle(_: str, trigger: str) -> float | None:
        passes.append(trigger)
        if len(passes) == 1:
            raise RuntimeError("no")
        again.set()
        return 3600.0 if len(passes) == 2 else None

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=1)
    queue.add("run", "first")
    await queue.idle()
    assert passes == ["first"]
    async with asyncio.timeout(10):
        await again.wait()
    assert passes == ["first", "retry"]
    await queue.idle()
    queue.add("run", "event")
    await queue.idle()
    assert passes == ["first", "retry", "event"]
    await queue.close()
    queue.add("run", "late")
    assert passes == ["first", "retry", "event"]


async def test_the_earliest_delayed_request_counts() -> None:
    passes: list[str] = []
    done = asyncio.Event()

    async def handle(_: str, trigger: str) -> None:
        passes.append(trigger)
        done.set()

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=1)
    queue.add_after("run", 0.01, "soon")
    queue.add_after("run", 3600, "late")
    async with asyncio.timeout(10):
        await done.wait()
    await queue.close()
    assert passes == ["soon"]


async def test_background_work_is_done_in_order_and_a_failure_stops_nothing() -> None:
    done: list[int] = []

    async def work(number: int) -> None:
        if number == 1:
            raise RuntimeError("no")
        done.append(number)

    background = EventQueue()
    task = asyncio.create_task(background.run())
    for number in range(4):
        background.put(work(number))
    await background.finish(seconds=10)
    task.cancel()
    assert done == [0, 2, 3]


async def test_background_work_that_takes_too_long_is_dropped_at_the_end() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    background = EventQueue()
    task = asyncio.create_task(background.run())
    for _ in range(3):
        background.put(never())
    await background.finish(seconds=0.01)
    task.cancel()


async def test_few_patient_keys_are_handled_at_a_time_and_they_hold_up_nobody() -> None:
    """Draining runs, while hundreds are being cancelled."""
    at_once, most = 0, 0
    order: list[str] = []
    gate = asyncio.Event()

    async def handle(key: str, _: str) -> None:
        nonlocal at_once, most
        order.append(key)
        if key.startswith("drain"):
            at_once += 1
            most = max(most, at_once)
            await gate.wait()
            at_once -= 1

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=64, patient=lambda key: key.startswith("drain"))
    for number in range(20):
        queue.add(f"drain-{number}", "timer")
    for _ in range(3):
        await asyncio.sleep(0)
    queue.add("cancel", "run")
    for _ in range(3):
        await asyncio.sleep(0)
    assert order[PATIENT:] == ["cancel"]
    gate.set()
    await queue.idle()
    assert (most, len(order)) == (PATIENT, 21)


async def test_a_waiting_key_that_becomes_urgent_is_next() -> None:
    """A cancel of a run that waits for its turn among thousands."""
    order: list[str] = []
    urgent: set[str] = set()
    gate = asyncio.Event()

    async def handle(key: str, trigger: str) -> None:
        order.append(f"{key} {trigger}")
        await gate.wait()

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=1, urgent=lambda key: key in urgent)
    for key in ("a", "b", "c"):
        queue.add(key, "resync")
    await asyncio.sleep(0)
    assert not queue.pressed
    urgent.add("c")
    queue.add("c", "cancel")
    assert queue.pressed
    gate.set()
    await queue.idle()
    assert order == ["a resync", "c cancel", "b resync"]


async def test_no_more_keys_than_the_limit_are_handled_at_once_and_one_that_is_asked_for_often_keeps_its_turn() -> None:
    order: list[str] = []
    at_once, most = 0, 0

    async def handle(key: str, _: str) -> None:
        nonlocal at_once, most
        order.append(key)
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=2)
    for key in ("a", "b", "c", "d", "c", "d", "c"):
        queue.add(key, "run")
    await queue.idle()
    assert (order, most) == (["a", "b", "c", "d"], 2)


async def test_patient_keys_have_their_turn_among_others() -> None:
    """Runs go on draining, however much is asked of the others."""
    order: list[str] = []

    async def handle(key: str, _: str) -> None:
        order.append(key)

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=1, patient=lambda key: key.startswith("drain"))
    for key in ("a", "drain-1", "b", "drain-2", "c"):
        queue.add(key, "run")
    await queue.idle()
    assert order == ["a", "drain-1", "b", "drain-2", "c"]


async def test_at_its_end_the_queue_waits_for_what_is_under_way_alone() -> None:
    done: list[str] = []

    async def handle(key: str, _: str) -> None:
        await asyncio.sleep(0)
        done.append(key)

    queue: WorkQueue[str] = WorkQueue(handle, concurrency=1)
    for key in ("a", "b"):
        queue.add(key, "run")
    await queue.close()
    assert done == ["a"]
