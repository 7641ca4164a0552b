"""The collector of cycles: seldom, and often enough."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from poller import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The collector's settings are the process's."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class Broken:
    """A cycle, as a connection that broke is one."""

    def __init__(self) -> None:
        self.me = self


async def test_what_broke_is_collected_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the young are looked at only after thousands of new objects. Then free pages are given back."""
    monkeypatch.setattr(garbage, "INTERVAL", 0.01)
    trimmed: list[int] = []
    monkeypatch.setattr(garbage, "_trim", trimmed.append)
    garbage.collect_rarely()
    assert gc.get_freeze_count() > 0
    broken = weakref.ref(Broken())
    assert broken() is not None
    task = asyncio.create_task(garbage.collect_young())
    async with asyncio.timeout(5):
        while broken() is not None or not trimmed:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
