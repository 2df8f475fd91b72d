"""Work that nobody waits for: in order, after its delay, and not while somebody does."""

from __future__ import annotations

import asyncio

from ingestrun.controller.reconcile.recorder import EventQueue


async def test_work_is_done_in_order_and_waits_while_the_process_is_pressed() -> None:
    pressed, done = True, list[int]()
    background = EventQueue(paused=lambda: pressed, delay_seconds=0)

    async def note(number: int) -> None:
        done.append(number)

    for number in range(3):
        background.put(note(number))
    task = asyncio.create_task(background.run())
    await asyncio.sleep(0.1)
    assert done == []
    pressed = False
    await background.finish(seconds=2)
    assert done == [0, 1, 2]
    task.cancel()


async def test_failed_work_is_the_end_of_itself_alone() -> None:
    background, done = EventQueue(delay_seconds=0), list[str]()

    async def fail() -> None:
        raise RuntimeError("no")

    async def note() -> None:
        done.append("after")

    background.put(fail())
    background.put(note())
    task = asyncio.create_task(background.run())
    await background.finish(seconds=2)
    assert done == ["after"]
    task.cancel()


async def test_what_is_not_done_in_time_is_dropped() -> None:
    background = EventQueue(paused=lambda: True, delay_seconds=0)

    async def never() -> None:
        raise AssertionError

    background.put(never())
    task = asyncio.create_task(background.run())
    await background.finish(seconds=0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
