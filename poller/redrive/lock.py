"""One redrive at a time where the place itself does not see to it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from poller.errors import PollerError


@contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Hold a lock file until the end of the block or of the process, however it ends; it is removed then.

    PollerError: another process holds it, and which; or there can be none.
    """
    try:
        descriptor = _lock(path, where)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else type(error).__name__
        raise PollerError(f"{where}: it cannot be locked against a second redrive: {path}: {reason}") from None
    try:
        yield
    finally:
        # Removed while it is locked: whoever has opened it meanwhile sees that the name leads elsewhere by now.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, where: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                    return descriptor
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            holder = f"process {pid}" if pid.isdecimal() else "another process"
            raise PollerError(f"{where}: {holder} redrives it already; wait until that has ended") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one that held it has removed it: there may be another file of that name
