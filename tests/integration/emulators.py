"""Local AWS emulators in processes of their own: one of each for the whole test run, on free loopback ports."""

import atexit
import functools
import http.client
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

_START_SECONDS = 30.0
_BIN = Path(sys.executable).parent
_accounts = itertools.count(100_000_000_001)


@functools.cache
def running(name: str) -> str:
    """The URL of a running `ministack`, `roto` or `moto`, started at the first use and ended with this process.

    `ministack-iam` is a MiniStack of its own that obeys IAM policies.
    """
    for _ in range(3):  # somebody else may take the port between our look and the emulator's bind
        port = free_port()
        process = subprocess.Popen(
            _command(name, port),
            env=_environment(name, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(_stop, process)
        if _answers(process, port):
            return f"http://127.0.0.1:{port}"
        _stop(process)
    raise RuntimeError(f"the emulator {name} does not start")


def new_account() -> str:
    """A 12-digit account that no other test uses. MiniStack and roto take it from the access key id."""
    return str(next(_accounts))


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(name: str, port: int) -> list[str]:
    match name:
        case "ministack" | "ministack-iam":
            return [str(_BIN / "ministack")]
        case "roto":
            return [str(_BIN / "roto-server"), "--ephemeral", "--port", str(port)]
        case "moto":
            return [str(_BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    raise ValueError(name)


def _environment(name: str, port: int) -> dict[str, str]:
    ours = {
        "AUTH": "true" if name == "ministack-iam" else "false",
        "GATEWAY_PORT": str(port),
        "BIND_HOST": "127.0.0.1",
        "MINISTACK_HOST": "127.0.0.1",
        "LOG_LEVEL": "ERROR",
        "IOT_MTLS_ENABLED": "0",  # these two of MiniStack listen on every address, whatever BIND_HOST says
        "SFTP_ENABLED": "0",
    }
    return {**os.environ, **ours}


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        else:
            return True
        finally:
            connection.close()
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
