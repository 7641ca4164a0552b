"""When has the config file changed?"""

import asyncio
import os
from pathlib import Path

import structlog
from watchfiles import Change, awatch

_log = structlog.get_logger(__name__)

_LOOK_INTERVAL = 5.0  # seconds between looks where nobody tells: network file systems, no inotify watches left
_DEBOUNCE = 1000  # milliseconds; how often a busy folder may wake us
_CONFIG_MAP_LINK = "..data"


def stamp(path: str) -> tuple[int, int, int] | None:
    """Changes with the file; None while there is none."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


async def watch(path: str, changed: asyncio.Event) -> None:
    """Set the event whenever the file may have changed, and now and then: `stamp` tells whether it has. For ever.

    Folders are watched, not the file: editors replace it, and a Kubernetes ConfigMap changes by a symbolic link beside
    it. A store that is written in the same folder all the time is passed over.
    """
    path = await asyncio.to_thread(os.path.abspath, path)  # of the start: the working directory may go
    while True:
        try:
            await _watch(path, changed)
        except (OSError, RuntimeError) as error:  # a folder is gone, no inotify watches are left, links in a circle
            _log.debug("config_not_watched", error=str(error))
            await asyncio.sleep(_LOOK_INTERVAL)
        changed.set()


async def _watch(path: str, changed: asyncio.Event) -> None:
    """Until the folders to watch are others."""
    folders = await asyncio.to_thread(_folders, path)
    names = {Path(path).name, (await asyncio.to_thread(Path(path).resolve)).name, _CONFIG_MAP_LINK}

    def is_ours(_: Change, changed_path: str) -> bool:
        return Path(changed_path).name in names

    told = awatch(
        *folders,
        watch_filter=is_ours,
        recursive=False,
        yield_on_timeout=True,
        rust_timeout=int(_LOOK_INTERVAL * 1000),
        debounce=_DEBOUNCE,
    )
    async for _ in told:
        changed.set()
        if await asyncio.to_thread(_folders, path) != folders:
            return


def _folders(path: str) -> list[Path]:
    """Where the name is, and where the file is that it leads to."""
    return sorted({Path(path).parent, Path(path).resolve().parent})
