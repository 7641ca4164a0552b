"""What the daemon is compared with: loops that do its work, each as a person would write it first.

`plain` is aiobotocore, `json` and aiohttp: read, build Lambda's event, POST it, then delete the messages or write the
position to SQLite. One task per shard, four for a queue. It reads as many records as a batch holds, so it needs no
batching, and it has no retries, filters, leases or metrics.

`boto3` is the same for a queue in four threads, each with a client of its own; it posts with urllib3, which boto3 brings
and which costs less than requests.

`bare` is the floor of any client on aiohttp: the same HTTP calls with canned bodies, unsigned; it parses nothing, builds
nothing and stores nothing.

`python -m tests.benchmarks.peers plain kinesis --endpoint URL ...` runs until it is ended. A stream's shard at its tip
is read again after a second. Over TLS the services are trusted by AWS_CA_BUNDLE, the target by `--ca`.
"""

import argparse
import asyncio
import base64
import json
import sqlite3
import ssl
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import aiohttp
import boto3
import urllib3
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from tests.benchmarks.records import ACCOUNT, ARNS, NAME, REGION

QUEUE_WORKERS = 4
_IDLE_SECONDS = 1.0
_WAIT_SECONDS = 20
_EVENT_BYTES = {"kinesis": 1_920, "dynamodb": 1_290, "sqs": 1_750}  # of a record in the plain loop's event
_HEADERS = {"Content-Type": "application/json"}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as Lambda's event has it."""
    return {
        "messageId": message["MessageId"],
        "receiptHandle": message["ReceiptHandle"],
        "body": message["Body"],
        "attributes": message["Attributes"],
        "messageAttributes": {},
        "md5OfBody": message["MD5OfBody"],
        "eventSource": "aws:sqs",
        "eventSourceARN": ARNS["sqs"],
        "awsRegion": REGION,
    }


def _receive(url: str, batch: int) -> dict[str, Any]:
    return {
        "QueueUrl": url,
        "MaxNumberOfMessages": batch,
        "WaitTimeSeconds": _WAIT_SECONDS,
        "MessageSystemAttributeNames": ["All"],
    }


def _entries(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What a DeleteMessageBatch names."""
    return [{"Id": str(place), "ReceiptHandle": message["ReceiptHandle"]} for place, message in enumerate(messages)]


class Plain:
    """The aiobotocore loop."""

    def __init__(self, endpoint: str, batch: int, database: str, ca: str | None) -> None:
        self._endpoint = endpoint
        self._batch = batch
        self._trust = ssl.create_default_context(cafile=ca) if ca else True
        # WAL and NORMAL: an easier promise than the daemon's FULL, in the loop's favour.
        self._database = sqlite3.connect(database, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("CREATE TABLE IF NOT EXISTS positions (shard TEXT PRIMARY KEY, sequence TEXT)")
        self._http: aiohttp.ClientSession
        self._client: Any

    async def run(self, source: str, shards: int) -> None:
        """Until cancelled."""
        service = {"kinesis": "kinesis", "dynamodb": "dynamodbstreams", "sqs": "sqs"}[source]
        config = AioConfig(max_pool_connections=max(10, min(shards, 100)))
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=self._trust)) as self._http,
            get_session().create_client(
                service, region_name=REGION, endpoint_url=self._endpoint, config=config
            ) as self._client,
            asyncio.TaskGroup() as tasks,
        ):
            if source == "sqs":
                url = (await self._client.get_queue_url(QueueName=NAME))["QueueUrl"]
                for _ in range(QUEUE_WORKERS):
                    tasks.create_task(self._queue(url))
            else:
                read = self._kinesis if source == "kinesis" else self._dynamodb
                for shard in await self._shards(source):
                    tasks.create_task(read(shard))

    async def _shards(self, source: str) -> list[str]:
        if source == "kinesis":
            pages = self._client.get_paginator("list_shards").paginate(StreamARN=ARNS["kinesis"])
            return [shard["ShardId"] async for page in pages for shard in page["Shards"]]
        answer = await self._client.describe_stream(StreamArn=ARNS["dynamodb"])
        return [shard["ShardId"] for shard in answer["StreamDescription"]["Shards"]]

    async def _deliver(self, records: list[dict[str, Any]]) -> None:
        event = json.dumps({"Records": records}).encode()
        async with self._http.post(f"{self._endpoint}/target", data=event, headers=_HEADERS) as response:
            await response.read()
            response.raise_for_status()

    def _save(self, shard: str, sequence: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", (shard, sequence))

    async def _kinesis(self, shard: str) -> None:
        arn = ARNS["kinesis"]
        answer = await self._client.get_shard_iterator(StreamARN=arn, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
        iterator = answer["ShardIterator"]
        while True:
            answer = await self._client.get_records(StreamARN=arn, ShardIterator=iterator, Limit=self._batch)
            iterator = answer["NextShardIterator"]
            if not answer["Records"]:
                await asyncio.sleep(_IDLE_SECONDS)
                continue
            await self._deliver(
                [
                    {
                        "kinesis": {
                            "kinesisSchemaVersion": "1.0",
                            "partitionKey": record["PartitionKey"],
                            "sequenceNumber": record["SequenceNumber"],
                            "data": base64.b64encode(record["Data"]).decode(),
                            "approximateArrivalTimestamp": _seconds(record["ApproximateArrivalTimestamp"]),
                        },
                        "eventSource": "aws:kinesis",
                        "eventVersion": "1.0",
                        "eventID": f"{shard}:{record['SequenceNumber']}",
                        "eventName": "aws:kinesis:record",
                        "invokeIdentityArn": "arn:aws:iam::000000000000:role/bench",
                        "awsRegion": REGION,
                        "eventSourceARN": arn,
                    }
                    for record in answer["Records"]
                ]
            )
            self._save(shard, answer["Records"][-1]["SequenceNumber"])

    async def _dynamodb(self, shard: str) -> None:
        arn = ARNS["dynamodb"]
        answer = await self._client.get_shard_iterator(StreamArn=arn, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
        iterator = answer["ShardIterator"]
        while True:
            answer = await self._client.get_records(ShardIterator=iterator, Limit=self._batch)
            iterator = answer["NextShardIterator"]
            if not answer["Records"]:
                await asyncio.sleep(_IDLE_SECONDS)
                continue
            for record in answer["Records"]:
                change = record["dynamodb"]
                change["ApproximateCreationDateTime"] = _seconds(change["ApproximateCreationDateTime"])
                record["eventSourceARN"] = arn
            await self._deliver(answer["Records"])
            self._save(shard, answer["Records"][-1]["dynamodb"]["SequenceNumber"])

    async def _queue(self, url: str) -> None:
        while True:
            answer = await self._client.receive_message(**_receive(url, self._batch))
            if messages := answer.get("Messages"):
                await self._deliver([_message(message) for message in messages])
                await self._client.delete_message_batch(QueueUrl=url, Entries=_entries(messages))


def _seconds(moment: datetime) -> float:
    return moment.timestamp()


class Threads:
    """The boto3 loop."""

    def __init__(self, endpoint: str, batch: int, ca: str | None) -> None:
        self._endpoint = endpoint
        self._batch = batch
        self._http = urllib3.PoolManager(maxsize=QUEUE_WORKERS, ca_certs=ca)

    def run(self) -> None:
        """Until the process is ended."""
        threads = [threading.Thread(target=self._queue) for _ in range(QUEUE_WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _queue(self) -> None:
        session = boto3.session.Session()  # one for each thread, as boto3's documentation asks for
        client = session.client("sqs", region_name=REGION, endpoint_url=self._endpoint)
        url = client.get_queue_url(QueueName=NAME)["QueueUrl"]
        while True:
            messages = client.receive_message(**_receive(url, self._batch)).get("Messages")
            if not messages:
                continue
            event = json.dumps({"Records": [_message(message) for message in messages]}).encode()
            answer = self._http.request("POST", f"{self._endpoint}/target", body=event, headers=_HEADERS, retries=False)
            if answer.status != 200:
                raise OSError(f"the target answered {answer.status}")
            client.delete_message_batch(QueueUrl=url, Entries=_entries(messages))


class Bare:
    """The canned loop."""

    def __init__(self, endpoint: str, batch: int) -> None:
        self._endpoint = endpoint
        self._batch = batch
        self._event = b""
        self._http: aiohttp.ClientSession

    async def run(self, source: str, shards: int) -> None:
        """Until cancelled."""
        self._event = b"x" * (_EVENT_BYTES[source] * self._batch)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._http,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(QUEUE_WORKERS if source == "sqs" else shards):
                tasks.create_task(self._queue() if source == "sqs" else self._stream(source))

    async def _call(self, path: str, operation: str, body: bytes) -> None:
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": operation}
        async with self._http.post(self._endpoint + path, data=body, headers=headers) as response:
            await response.read()

    async def _stream(self, source: str) -> None:
        service = {"kinesis": "Kinesis_20131202", "dynamodb": "DynamoDBStreams_20120810"}[source]
        request = b'{"ShardIterator":"iterator/0/0","Limit":%d}' % self._batch
        while True:
            await self._call("/", f"{service}.GetRecords", request)
            await self._call("/sink", "", self._event)

    async def _queue(self) -> None:
        url = f"{self._endpoint}/{ACCOUNT}/{NAME}"
        receive = json.dumps(
            {"QueueUrl": url, "MaxNumberOfMessages": self._batch, "WaitTimeSeconds": _WAIT_SECONDS}
        ).encode()
        handle = "handle" + "0" * 12 + "h" * 160
        entries = [{"Id": str(place), "ReceiptHandle": handle} for place in range(self._batch)]
        delete = json.dumps({"QueueUrl": url, "Entries": entries}).encode()
        while True:
            await self._call("/", "AmazonSQS.ReceiveMessage", receive)
            await self._call("/sink", "", self._event)
            await self._call("/", "AmazonSQS.DeleteMessageBatch", delete)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("client", choices=["plain", "boto3", "bare"])
    parser.add_argument("source", choices=sorted(ARNS))
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--ca", help="PEM file that the target's certificate is checked with")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--database", default=":memory:", help="SQLite file for the positions of streams")
    options = parser.parse_args(arguments)
    match options.client:
        case "boto3" if options.source != "sqs":
            parser.error("boto3 reads queues only")
        case "boto3":
            Threads(options.endpoint, options.batch, options.ca).run()
        case "plain":
            plain = Plain(options.endpoint, options.batch, options.database, options.ca)
            asyncio.run(plain.run(options.source, options.shards))
        case "bare":
            asyncio.run(Bare(options.endpoint, options.batch).run(options.source, options.shards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
