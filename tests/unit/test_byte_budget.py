"""Bytes of records held by the process: who is told when some are given back."""

import asyncio

from poller.runtime.gate import ByteBudget


def test_who_finds_room_is_told_in_order() -> None:
    """Those who asked first, as far as it reaches; who needs too much keeps nobody waiting, and waits on."""
    budget = ByteBudget(100)
    budget.take(100)
    large, first, second = asyncio.Event(), asyncio.Event(), asyncio.Event()
    budget.notify(large, 80)
    budget.notify(first, 30)
    budget.notify(second, 30)
    budget.give(50)
    assert [event.is_set() for event in (large, first, second)] == [False, True, False]
    budget.give(50)
    assert large.is_set()
    assert not second.is_set()


def test_each_is_told_once() -> None:
    """And not at all when it waits no more."""
    budget = ByteBudget(100)
    budget.take(100)
    event, gone = asyncio.Event(), asyncio.Event()
    budget.notify(event, 1)
    budget.notify(gone, 1)
    budget.forget(gone)
    budget.give(10)
    event.clear()
    budget.give(10)
    assert not event.is_set()
    assert not gone.is_set()
