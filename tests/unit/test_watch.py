"""The config file is looked at when it changes."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from poller import watch


@pytest.fixture
async def watched(tmp_path):
    """A file, and how to watch it: answers the event that tells of changes."""
    path = tmp_path / "poller.yaml"
    path.write_text("a: 1\n")
    tasks: list[asyncio.Task] = []

    def start(at: Path = path) -> asyncio.Event:
        changed = asyncio.Event()
        tasks.append(asyncio.create_task(watch.watch(str(at), changed)))
        return changed

    yield path, start
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(changed: asyncio.Event, change) -> None:
    """Make the change until it is noticed: the first may come before the folder is watched."""
    async with asyncio.timeout(20):
        while not changed.is_set():
            change()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.5):
                    await changed.wait()


async def test_a_write_is_noticed(watched, monkeypatch) -> None:
    """In place, as `echo >>` does."""
    monkeypatch.setattr(watch, "_LOOK_INTERVAL", 3600.0)
    path, start = watched
    await until(start(), lambda: path.write_text(path.read_text() + "#\n"))


async def test_a_replaced_file_is_noticed(watched, monkeypatch) -> None:
    """As editors do: a new file is renamed over the old one."""
    monkeypatch.setattr(watch, "_LOOK_INTERVAL", 3600.0)
    path, start = watched

    def replace() -> None:
        other = path.with_name("new")
        other.write_text("a: 2\n")
        other.replace(path)

    await until(start(), replace)


async def test_a_config_map_is_noticed(watched, monkeypatch) -> None:
    """Kubernetes swaps a symbolic link to a folder; the file's own name never changes."""
    monkeypatch.setattr(watch, "_LOOK_INTERVAL", 3600.0)
    path, start = watched
    versions = 0

    def swap() -> None:
        nonlocal versions
        versions += 1
        folder = path.with_name(f"..{versions}")
        folder.mkdir()
        (folder / "map.yaml").write_text(f"a: {versions}\n")
        link = path.with_name("..data_tmp")
        link.symlink_to(folder.name)
        link.rename(path.with_name("..data"))

    swap()
    mounted = path.with_name("map.yaml")
    mounted.symlink_to("..data/map.yaml")
    before = watch.stamp(str(mounted))
    await until(start(mounted), swap)
    assert watch.stamp(str(mounted)) != before


async def test_a_busy_neighbour_is_passed_over(watched, monkeypatch) -> None:
    """The store may lie in the same folder; it is written all the time."""
    monkeypatch.setattr(watch, "_LOOK_INTERVAL", 3600.0)
    path, start = watched
    changed = start()
    await until(changed, lambda: path.write_text(path.read_text() + "#\n"))
    changed.clear()
    for number in range(24):
        path.with_name("poller.db-wal").write_text(str(number))
        await asyncio.sleep(0.05)
    assert not changed.is_set()


async def test_without_being_told_it_looks_now_and_then(watched, monkeypatch) -> None:
    """A folder that cannot be watched, because it is not there, is no end: the file may come back."""
    monkeypatch.setattr(watch, "_LOOK_INTERVAL", 0.05)
    path, start = watched
    async with asyncio.timeout(10):
        await start().wait()
        await start(path.parent / "gone" / "poller.yaml").wait()


def test_a_stamp_changes_with_the_file(tmp_path) -> None:
    """None without one."""
    path = tmp_path / "f"
    assert watch.stamp(str(path)) is None
    path.write_text("1")
    first = watch.stamp(str(path))
    path.write_text("22")
    assert first != watch.stamp(str(path)) is not None
