"""SQS queues, SNS topics, S3 buckets and EventBridge buses as failure destinations (semantics 10)."""

import re

from botocore.exceptions import ClientError

from poller.aws.errors import aws_error
from poller.aws.lean import AwsError
from poller.aws.queues import queue_url
from poller.aws.service import Service
from poller.aws.session import AwsClients
from poller.core.model import Notice
from poller.core.notices import identity, s3_key
from poller.errors import ConfigError, DestinationFailed
from poller.ports import Destination

# Bytes of one message. A queue may be set to take less, and old ones often are.
_SQS_BYTES = 1_048_576
_SNS_BYTES = 262_144
# Of one entry. Its source, detail type and resources count too: a word, a condition and two ARNs, none over 512 bytes.
_EVENT_BYTES = 262_144 - 2_048

_EVENT_SOURCE = "esm-poller"
_CONTENT_TYPE = "application/octet-stream"  # as AWS's own, though it is JSON

_PARTITION = "arn:aws[a-zA-Z0-9-]*"
_BUCKET = re.compile(_PARTITION + ":s3:::(?P<bucket>[a-zA-Z0-9._-]{3,255})")
_ARN = re.compile(
    _PARTITION + "(?=:sqs:[^:]*:[^:]*:[a-zA-Z0-9_-]{1,80}$|:sns:[^:]*:[^:]*:[a-zA-Z0-9_-]{1,256}$"
    "|:events:[^:]*:[^:]*:event-bus/[a-zA-Z0-9/._-]{1,256}$)"
    ":(?P<service>[a-z]+):(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):(?P<name>.+)"
)
_SHORTER = re.compile(r"shorter than ([0-9]{1,9}) bytes")


def open_destination(arn: str, source_region: str, clients: AwsClients, timeout: float) -> Destination:
    """The destination of an ARN. ConfigError when it is none of these four."""
    if bucket := _BUCKET.fullmatch(arn):
        return S3Destination(Service("s3", source_region, arn, clients, timeout), bucket["bucket"])
    parts = _ARN.fullmatch(arn)
    if parts is None:
        raise ConfigError(
            ["DestinationConfig.OnFailure.Destination: not the ARN of a queue, topic (no FIFO), bucket or event bus"]
        )
    service = Service(parts["service"], parts["region"], arn, clients, timeout)
    match parts["service"]:
        case "sqs":
            return SqsDestination(service, parts["account"], parts["name"])
        case "sns":
            return SnsDestination(service, arn)
        case _:
            return EventsDestination(service, arn)


class SqsDestination:
    """A `Destination` that is a standard queue."""

    def __init__(self, service: Service, account: str, name: str) -> None:
        self.limit: int | None = _SQS_BYTES
        self._service = service
        self._account = account
        self._name = name
        self._url = ""

    async def send(self, notice: Notice, body: bytes) -> None:  # noqa: ARG002
        """One message. A queue that is set to take less says so once, and `limit` falls to that."""
        async with self._service.calling("sqs:SendMessage") as client:
            url = await self._queue_url()
            try:
                answer = await client.send_message(QueueUrl=url, MessageBody=body.decode())
            except ClientError as error:
                shorter = _SHORTER.search(aws_error(error).message)
                if shorter is None:
                    raise
                self.limit = min(int(shorter[1]), len(body) - 1)
                raise DestinationFailed(
                    f"{self._service.where}: the queue takes at most {shorter[1]} bytes and the record has "
                    f"{len(body)}; raise the queue's MaximumMessageSize if this lasts"
                ) from None
        if not answer.get("MessageId"):
            raise self._service.unreadable("sqs:SendMessage")

    async def check(self) -> str | None:
        """Is the queue there, and may we look at it? Whether we may send only a message would show."""
        try:
            async with self._service.calling("sqs:GetQueueUrl"):
                url = await self._queue_url()
        except DestinationFailed as error:
            return str(error)
        action = "sqs:GetQueueAttributes"
        return await self._service.problem(action, "get_queue_attributes", QueueUrl=url, AttributeNames=["QueueArn"])

    async def close(self) -> None:
        """Nothing: the connections belong to the `AwsClients`."""

    async def _queue_url(self) -> str:
        if not self._url:
            self._url = await queue_url(self._service.clients, self._service.region, self._account, self._name)
        return self._url


class SnsDestination:
    """A `Destination` that is a standard topic."""

    def __init__(self, service: Service, arn: str) -> None:
        self.limit: int | None = _SNS_BYTES
        self._service = service
        self._arn = arn

    async def send(self, notice: Notice, body: bytes) -> None:  # noqa: ARG002
        """One notification."""
        async with self._service.calling("sns:Publish") as client:
            answer = await client.publish(TopicArn=self._arn, Message=body.decode())
        if not answer.get("MessageId"):
            raise self._service.unreadable("sns:Publish")

    async def check(self) -> str | None:
        """Is the topic there, and may we look at it? Whether we may publish only a notification would show."""
        return await self._service.problem("sns:GetTopicAttributes", "get_topic_attributes", TopicArn=self._arn)

    async def close(self) -> None:
        """Nothing: the connections belong to the `AwsClients`."""


class S3Destination:
    """A `Destination` that is a bucket, in any region: botocore follows S3's answer to the bucket's own."""

    limit: int | None = None

    def __init__(self, service: Service, bucket: str) -> None:
        self._service = service
        self._bucket = bucket

    async def send(self, notice: Notice, body: bytes) -> None:
        """One object. Sent again, it has the same key and so is one object still."""
        key = s3_key(notice, identity(notice))
        async with self._service.calling("s3:PutObject") as client:
            await client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=_CONTENT_TYPE)

    async def check(self) -> str | None:
        """Is the bucket there, and may we look at it? Whether we may write only an object would show."""
        return await self._service.problem("s3:ListBucket", "head_bucket", Bucket=self._bucket)

    async def close(self) -> None:
        """Nothing: the connections belong to the `AwsClients`."""


class EventsDestination:
    """A `Destination` that is an EventBridge bus: the record is the detail, its condition the detail type."""

    def __init__(self, service: Service, arn: str) -> None:
        self.limit: int | None = _EVENT_BYTES
        self._service = service
        self._arn = arn

    async def send(self, notice: Notice, body: bytes) -> None:
        """One event. EventBridge answers 200 for entries that it did not take, too."""
        entry = {
            "EventBusName": self._arn,
            "Source": _EVENT_SOURCE,
            "DetailType": notice.reason.value,
            "Detail": body.decode(),
            "Resources": [notice.mapping.function.arn, notice.mapping.source.arn],
        }
        async with self._service.calling("events:PutEvents") as client:
            answer = await client.put_events(Entries=[entry])
            entries = answer.get("Entries") or [{}]
            if code := entries[0].get("ErrorCode"):
                # In the same words as a refusal of the whole call.
                raise AwsError(str(code), 200, "")
        if not entries[0].get("EventId") or answer.get("FailedEntryCount", 0):
            raise self._service.unreadable("events:PutEvents")

    async def check(self) -> str | None:
        """Is the bus there, and may we look at it? Whether we may put only an event would show."""
        return await self._service.problem("events:DescribeEventBus", "describe_event_bus", Name=self._arn)

    async def close(self) -> None:
        """Nothing: the connections belong to the `AwsClients`."""
