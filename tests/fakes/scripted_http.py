"""An HTTP server on 127.0.0.1 that answers, or misbehaves, exactly as a test says."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Script = Callable[["Request", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Request:
    """What the server got. `body` is read by then unless the server answers early."""

    method: str
    target: str
    headers: dict[str, str]
    reader: asyncio.StreamReader
    body: bytes = b""

    async def hung_up(self) -> None:
        """Returns when the client has closed the connection."""
        assert await self.reader.read() == b""


@dataclass
class Server:
    """Speaks just enough HTTP to misbehave exactly."""

    script: Script
    early: bool = False
    """Answer as soon as the headers are there, read no further."""
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
                request = Request(*first.split(" ")[:2], headers, reader)
                self.requests.append(request)
                if not self.early:
                    request.body = await reader.readexactly(int(headers["content-length"]))
                await self.script(request, writer)
                await writer.drain()
        except asyncio.CancelledError:
            writer.transport.abort()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()
            self.tasks.discard(task)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(script: Script, early: bool = False, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(script, early)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=2**24, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    async with listener:
        try:
            yield server
        finally:
            tasks = tuple(server.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def answering(status: int = 200, body: bytes = b"null", *headers: str) -> Script:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(
            "\r\n".join((f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", "")).encode() + body
        )

    return script


def closing(sent: bytes, reset: bool) -> Script:
    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        else:
            writer.close()

    return script
