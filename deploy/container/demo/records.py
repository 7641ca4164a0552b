"""Makes the stream and the queues that poller.yaml names, then writes records to them until it is stopped.

The AWS is where AWS_ENDPOINT_URL says; compose.yaml points it at the local one.
"""

import asyncio
import itertools
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from aiobotocore.session import get_session

STREAM, QUEUES = "orders", ("orders", "orders-failed")
SHARDS = 2
RECORDS_PER_SECOND = 5
READY = Path("/tmp/ready")  # noqa: S108 - of its own container; there once the sources are


async def make(kinesis: Any, sqs: Any) -> str:
    """The sources, made unless they are there; answers the URL of the first queue."""
    if STREAM not in (await kinesis.list_streams())["StreamNames"]:
        await kinesis.create_stream(StreamName=STREAM, ShardCount=SHARDS)
    await kinesis.get_waiter("stream_exists").wait(StreamName=STREAM, WaiterConfig={"Delay": 1})
    urls = [(await sqs.create_queue(QueueName=name))["QueueUrl"] for name in QUEUES]
    return str(urls[0])


async def main() -> None:
    """Until it is cancelled."""
    session = get_session()
    async with AsyncExitStack() as clients:
        kinesis = await clients.enter_async_context(session.create_client("kinesis"))
        sqs = await clients.enter_async_context(session.create_client("sqs"))
        queue = await make(kinesis, sqs)
        READY.touch()  # noqa: ASYNC240 - one file in memory
        for number in itertools.count():
            order = json.dumps({"order": number})
            await kinesis.put_record(StreamName=STREAM, Data=order.encode(), PartitionKey=f"customer-{number % 10}")
            await sqs.send_message(QueueUrl=queue, MessageBody=order)
            await asyncio.sleep(1 / RECORDS_PER_SECOND)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)
