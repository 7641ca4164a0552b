"""What a new mapping names: is it there? Asked once, when the mapping is made or changed, as AWS does (semantics 1.4).

Whoever cannot be asked (no network, no right to look, an emulator without that service) is believed to be there: the
mapping then waits for it, in sight of everybody.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from botocore.exceptions import BotoCoreError, ClientError

from poller.aws.errors import ErrorTable, aws_error, translated
from poller.aws.queues import queue_url
from poller.aws.session import AwsClients
from poller.core.model import SourceKind, SourceSpec
from poller.errors import AccessDenied, ApiError, PollerError, SourceGone
from poller.settings import LambdaFunction

_TIMEOUT = 5.0  # of each question; a client of the API waits for the answer
_NOT_THERE: ErrorTable = {"ResourceNotFoundException": SourceGone}
_NO_QUEUE = (
    "Error occurred while ReceiveMessage. SQS Error Code: AWS.SimpleQueueService.NonExistentQueue. "
    "SQS Error Message: The specified queue does not exist."
)
_NO_ACCESS = (
    "Cannot access stream {arn}. Please ensure the role can perform the GetRecords, GetShardIterator, DescribeStream, "
    "and ListStreams Actions on your stream in IAM."
)


class Probe:
    """Asks AWS, or the emulator in its place. `clients` must outlive it."""

    def __init__(self, clients: AwsClients) -> None:
        self._clients = clients
        self._roles: dict[tuple[str, str], str] = {}

    async def source(self, source: SourceSpec) -> None:
        """ApiError: the source is not there, or may not be read."""
        try:
            async with self._clients_of(source) as clients, asyncio.timeout(_TIMEOUT):
                await _look(clients, source)
        except SourceGone:
            text = _NO_QUEUE if source.kind is SourceKind.SQS else f"Stream not found: {source.arn}"
            raise _refused(text) from None
        except AccessDenied:
            if source.kind.is_stream:
                raise _refused(_NO_ACCESS.format(arn=source.arn)) from None
        except (PollerError, TimeoutError):
            pass

    @asynccontextmanager
    async def _clients_of(self, source: SourceSpec) -> AsyncIterator[AwsClients]:
        """Those that the source is read with, while they are needed."""
        self._clients.hold(source.role, source.region)
        try:
            yield self._clients.acting_as(source.role, source.region)
        finally:
            await self._clients.release(source.role)

    async def position(self, source: SourceSpec, shard: str, sequence: str) -> None:
        """ApiError: the shard has no such record, or not any more. Going there all the same would begin anywhere."""
        request = {"ShardId": shard, "ShardIteratorType": "AT_SEQUENCE_NUMBER"}
        refused = ("InvalidArgumentException", "ResourceNotFoundException", "TrimmedDataAccessException")
        try:
            async with self._clients_of(source) as clients, asyncio.timeout(_TIMEOUT):
                if source.kind is SourceKind.DYNAMODB:
                    client = await clients.client("dynamodbstreams", source.region, attempts=1)
                    await client.get_shard_iterator(StreamArn=source.arn, SequenceNumber=sequence, **request)
                else:
                    client = await clients.client("kinesis", source.region, attempts=1)
                    stream = source.arn.partition("/consumer/")[0]
                    await client.get_shard_iterator(StreamARN=stream, StartingSequenceNumber=sequence, **request)
        except ClientError as error:
            found = aws_error(error)
            if found.code in {*refused, "ValidationException"}:
                raise _refused(f"sequence {sequence} is not in shard {shard}: {found.message}") from None
        except (PollerError, BotoCoreError, TimeoutError):
            pass

    async def function(self, function: LambdaFunction, region: str) -> None:
        """ApiError: there is no such function."""
        try:
            await self._ask(function, region)
        except SourceGone:
            raise _refused("Function does not exist") from None
        except (PollerError, TimeoutError):
            pass

    async def role(self, function: LambdaFunction, region: str) -> str | None:
        """The ARN of a function's role; None when it cannot be known now. Asked until there was an answer."""
        key = (function.arn, region)
        if key not in self._roles:
            try:
                self._roles[key] = await self._ask(function, region)
            except (PollerError, TimeoutError):
                return None
        return self._roles[key] or None

    async def _ask(self, function: LambdaFunction, region: str) -> str:
        async with asyncio.timeout(_TIMEOUT):
            client = await self._clients.client("lambda", region, attempts=1)
            with translated("GetFunction", _NOT_THERE):
                answer = await client.get_function(FunctionName=function.arn)
        return str(answer.get("Configuration", {}).get("Role", ""))


async def _look(clients: AwsClients, source: SourceSpec) -> None:
    match source.kind:
        case SourceKind.SQS:
            await queue_url(clients, source.region, source.account, source.name)
        case SourceKind.DYNAMODB:
            streams = await clients.client("dynamodbstreams", source.region, attempts=1)
            with translated("DescribeStream", _NOT_THERE):
                await streams.describe_stream(StreamArn=source.arn, Limit=1)
        case SourceKind.KINESIS:
            kinesis = await clients.client("kinesis", source.region, attempts=1)
            with translated("ListShards", _NOT_THERE):
                await kinesis.list_shards(StreamARN=source.arn.partition("/consumer/")[0], MaxResults=1)
            if source.fan_out:
                with translated("DescribeStreamConsumer", _NOT_THERE):
                    await kinesis.describe_stream_consumer(ConsumerARN=source.arn)


def _refused(text: str) -> ApiError:
    return ApiError("InvalidParameterValueException", 400, text)
