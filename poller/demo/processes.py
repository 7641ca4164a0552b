"""The demo's child processes. They know nothing of the user's AWS account and do not outlive the demo."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from importlib import metadata
from pathlib import Path

import aiohttp

from poller.errors import PollerError

REGION = "eu-west-1"
GRACE_SECONDS = 10.0  # what the daemon has for its last deliveries
_STOP_SECONDS = GRACE_SECONDS + 5.0
_START_SECONDS = 30.0
_TAIL_LINES = 12
_KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "TZ",
    "TERM",
    "COLORTERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
)

# Becomes the child, which the kernel kills when the demo dies without a chance to stop it (PR_SET_PDEATHSIG is 1,
# SIGKILL 9, and both outlive exec). The parent may be gone before the call: then there is nothing to become.
_LEASHED = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class DemoFailedError(PollerError):
    """The demo cannot go on; the text says why."""


@contextmanager
def isolated(home: Path) -> Iterator[None]:
    """Inside, this process and its children have dummy credentials and no profile, endpoint, proxy or home of the user.

    Only what a Python process and a terminal need is kept, so no variable that some SDK knows can lead to an account.
    """
    before = dict(os.environ)
    kept = {name: before[name] for name in _KEPT if name in before}
    ours = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    os.environ.clear()
    os.environ.update(kept | ours)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def roto_server() -> str | None:
    """The program that roto-aws installs; None without it, as it has no wheel for some platforms."""
    try:
        files = metadata.files("roto-aws") or []
    except metadata.PackageNotFoundError:
        return None
    programs = [str(Path(str(file.locate())).resolve()) for file in files if file.name == "roto-server"]
    return next((program for program in programs if os.access(program, os.X_OK)), None)


def python_module(*arguments: str) -> list[str]:
    """The command for `python -m ARGUMENTS` with this Python."""
    return [sys.executable, "-P", "-m", *arguments]


class Child:
    """A running child; its output goes to the file `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log

    async def died(self) -> None:
        """Waits for the end of the child. DemoFailedError, as it is not wanted while somebody waits here."""
        code = await self._process.wait()
        raise DemoFailedError(f"{self.name} ended by itself with {_meaning(code)}")

    async def answers(self, session: aiohttp.ClientSession, url: str, status: int = 200) -> None:
        """Waits until `url` answers with `status`. DemoFailedError: the child died, or did not come up in time."""
        reason = ""
        try:
            async with asyncio.timeout(_START_SECONDS):
                while self._process.returncode is None:
                    with suppress(aiohttp.ClientError, TimeoutError):
                        async with session.get(url) as answer:
                            reason = f": {(await answer.text()).strip()}"
                            if answer.status == status:
                                return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = f"{self.name} is not ready after {_START_SECONDS:.0f} s, {url} says{reason or ' nothing'}"
            raise DemoFailedError(text) from None
        await self.died()

    async def stop(self) -> None:
        """SIGTERM and wait. DemoFailedError when it did not end in time and with exit code 0."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                code = await self._process.wait()
        except TimeoutError:
            raise DemoFailedError(f"{self.name} did not stop within {_STOP_SECONDS:.0f} s of SIGTERM") from None
        if code != 0:
            raise DemoFailedError(f"{self.name} was asked to stop and ended with {_meaning(code)}")

    async def kill(self) -> None:
        """End it at once; nothing happens when it has ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def tail(self) -> list[str]:
        """The last lines of its log."""
        return self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]


@asynccontextmanager
async def child(name: str, command: Sequence[str], home: Path, **variables: str) -> AsyncIterator[Child]:
    """Runs `command`, whose first word is a full path; killed on leaving.

    It has a session of its own, so that Ctrl-C reaches the demo only.
    """
    log = home / f"{name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _LEASHED, str(os.getpid()), *command),
            cwd=home,
            env={**os.environ, **variables},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    started = Child(name, process, log)
    try:
        yield started
    finally:
        await started.kill()


def _meaning(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
