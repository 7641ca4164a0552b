"""`python -m tests.fakes.aws --port 0` prints `{"port": N}` and serves on loopback until SIGTERM or SIGINT."""

import argparse
import asyncio
import json
import signal

from tests.fakes.aws.server import FakeAws


async def serve(port: int, *, is_throttling: bool) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with FakeAws(port=port, is_throttling=is_throttling) as aws:
        print(json.dumps({"port": aws.port}), flush=True)
        await ended.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.aws")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--throttle", action="store_true", help="AWS's limits from the start")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port, is_throttling=arguments.throttle))
