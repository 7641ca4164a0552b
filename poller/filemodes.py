"""Files that hold secrets or positions, and that others on the machine may read or replace."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from poller.settings import Settings, StoreSettings


@dataclass(frozen=True, slots=True)
class LooseMode:
    """One file or directory. `mode`: octal, as chmod takes it. `remedy`: a command."""

    path: str
    mode: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason} (mode {self.mode}); run {self.remedy}"


def loose_modes(settings: Settings) -> list[LooseMode]:
    """What a start and `validate` warn about: the config file where it has secrets, the store's file and directory.

    A file of somebody else that this process reads as a member of its group is meant to be read so: `root:poller`, 640.
    """
    found = list(_readable(settings.path, "has or names secrets and")) if settings.secrets() else []
    if isinstance(settings.store, StoreSettings):
        path = os.path.realpath(settings.store.path)
        found += _readable(path, "is the store and")
        found += _readable(f"{path}-wal", "is the store's log and")
        found += _replaceable(str(Path(path).parent))
    return found


def _readable(path: str, what: str) -> Iterator[LooseMode]:
    try:
        seen = Path(path).stat()
    except OSError:  # a store that is to be made
        return
    by_group = seen.st_mode & stat.S_IRGRP and not _is_for_us(seen)
    if seen.st_mode & stat.S_IROTH:
        reason = f"{what} can be read by every user"
    elif by_group:
        reason = f"{what} can be read by its group"
    else:
        return
    yield LooseMode(path, _octal(seen), reason, f"chmod {'o' if _is_for_us(seen) else 'go'}-rwx {path}")


def _is_for_us(seen: os.stat_result) -> bool:
    return seen.st_uid != os.geteuid() and seen.st_gid in {os.getegid(), *os.getgroups()}


def _replaceable(folder: str) -> Iterator[LooseMode]:
    """In a sticky one, such as /tmp, only its owner replaces a file."""
    try:
        seen = Path(folder).stat()
    except OSError:
        return
    if seen.st_mode & stat.S_IWOTH and not seen.st_mode & stat.S_ISVTX:
        reason = "is the store's directory and can be written to by every user"
        yield LooseMode(folder, _octal(seen), reason, f"chmod o-w {folder}")


def _octal(seen: os.stat_result) -> str:
    return f"{stat.S_IMODE(seen.st_mode):04o}"
