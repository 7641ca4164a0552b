"""Failure records as files: one JSON document a batch, in one directory."""

import asyncio
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from poller.core.model import Notice
from poller.core.notices import identity, s3_key
from poller.errors import ConfigError, DestinationFailed

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_PART = 72  # characters of mapping and shard in a name; file systems end at 255 for all of it
_MISTAKE = "DestinationConfig.OnFailure.Destination: not a directory; file:///PATH would be, without ? and #"

T = TypeVar("T")


class FileDestination:
    """A `Destination` that is a directory of this machine.

    A file there is always whole: it is written beside as `.NAME.tmp`, synced and renamed. What a crash leaves of those
    may be deleted. The directory is made if its parent is there: a whole path that is missing is a volume that is not
    mounted, or a typing error.
    """

    limit: int | None = None

    def __init__(self, target: str, timeout: float) -> None:
        """`timeout`: seconds for one file. ConfigError: not `file:///PATH`."""
        directory = directory_of(target)
        if directory is None:
            raise ConfigError([_MISTAKE])
        self._directory = directory
        self._timeout = timeout
        self._thread: ThreadPoolExecutor | None = None

    async def send(self, notice: Notice, body: bytes) -> None:
        """One file, safe on disk. Sent again, it has the same name and so is one file still."""
        name = file_name(notice)
        try:
            await self._run(lambda: _write(self._directory, name, body))
        except TimeoutError:
            raise DestinationFailed(f"{self._directory}: not written within {self._timeout:g} s") from None
        except OSError as error:
            raise DestinationFailed(f"{self._directory}: {_why(error)}") from None

    async def check(self) -> str | None:
        """Could a file be written there? Only looks."""
        try:
            reason = await self._run(lambda: _why_not(self._directory))
        except TimeoutError:
            reason = f"no answer within {self._timeout:g} s"
        except OSError as error:
            reason = _why(error)
        return None if reason is None else f"{self._directory}: {reason}"

    async def close(self) -> None:
        """Give the thread up, even one that hangs in a dead file system; a later `send` starts another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        """In a thread of its own, one at a time: a file system that hangs must not take the threads of others."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="file-destination")
        async with asyncio.timeout(self._timeout):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def directory_of(url: str) -> Path | None:
    """The directory that `file:///PATH` means; None: it is not of that form."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or parts.query or parts.fragment:
        return None
    return Path(path) if path.startswith("/") and "\0" not in path else None


def file_name(notice: Notice) -> str:
    """`MAPPING-SHARD-YYYY-MM-DDTHH.MM.SS-UUID.json`; whatever mapping and shard are, one name in one directory."""
    last = s3_key(notice, identity(notice)).rpartition("/")[2]
    mapping, shard = (_UNSAFE.sub("_", part)[:_LONGEST_PART] for part in (notice.mapping.id, notice.shard))
    return f"{mapping}-{shard}-{last}.json"


def _write(directory: Path, name: str, body: bytes) -> None:
    with suppress(FileExistsError):
        directory.mkdir()
        _sync(directory.parent)
    descriptor, temporary = tempfile.mkstemp(".tmp", f".{name}.", directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).replace(directory / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(directory)


def _sync(directory: Path) -> None:
    """A new name is safe only with its directory."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why_not(directory: Path) -> str | None:
    if directory.exists():
        if not directory.is_dir():
            return "it is not a directory"
        return None if os.access(directory, os.W_OK | os.X_OK) else "this user may not write there"
    if not directory.parent.is_dir():
        return f"neither it nor {directory.parent} is there; make it, or mount its volume"
    if not os.access(directory.parent, os.W_OK | os.X_OK):
        return f"it is not there, and this user may not make it in {directory.parent}"
    return None


def _why(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "neither it nor its parent is there; make it, or mount its volume"
        case NotADirectoryError() | FileExistsError():
            return "it is not a directory"
        case _:
            return os.strerror(error.errno).lower() if error.errno else type(error).__name__
