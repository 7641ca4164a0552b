"""What can be polled. To add a source, write its module, its line in KINDS and its case in `Sources`."""

from dataclasses import dataclass

from poller.aws.session import AwsClients
from poller.core.model import Mapping, SourceKind, SourceSpec, StreamTraits
from poller.ports import Clock, QueueSource, StreamSource
from poller.sources import dynamodb, fanout, kinesis, sqs


@dataclass(frozen=True, slots=True)
class Kind:
    """Facts of one kind of source. `service`: as botocore spells it. `traits`: None for a queue."""

    service: str
    traits: StreamTraits | None = None


KINDS: dict[SourceKind, Kind] = {
    SourceKind.KINESIS: Kind("kinesis", kinesis.TRAITS),
    SourceKind.DYNAMODB: Kind("dynamodbstreams", dynamodb.TRAITS),
    SourceKind.SQS: Kind("sqs"),
}


def traits(source: SourceSpec) -> StreamTraits | None:
    """How this source is read: a registered consumer of a Kinesis stream is pushed to. None for a queue."""
    return fanout.TRAITS if source.fan_out else KINDS[source.kind].traits


class Sources:
    """Opens the source of a mapping. One for the process: it holds the read limits that mappings share."""

    def __init__(self, clients: AwsClients, clock: Clock) -> None:
        self._clients = clients
        self._clock = clock
        self._limits = kinesis.ReadLimits()

    async def open_stream(self, mapping: Mapping) -> StreamSource:
        """The stream of a mapping. Nothing is called yet, so it cannot fail for the stream's sake."""
        if mapping.source.fan_out:
            clients, role = self._of(mapping.source), mapping.function.role
            return fanout.FanOutSource(mapping.source, role, clients, self._clock, self._limits)
        return self.open_again(mapping.source, mapping.function.role)

    def open_again(self, source: SourceSpec, role: str) -> StreamSource:
        """A stream, to read ranges of it again by position. A registered consumer's subscription stays with whoever has
        it: AWS gives it to one reader. Nothing is called yet. `role`: the function's.
        """
        match source.kind:
            case SourceKind.KINESIS:
                return kinesis.KinesisSource(source, role, self._of(source), self._clock, self._limits)
            case SourceKind.DYNAMODB:
                return dynamodb.DynamoSource(source, self._of(source), self._clock)
            case SourceKind.SQS:
                raise ValueError(f"{source.arn} is a queue")

    async def open_queue(self, mapping: Mapping) -> QueueSource:
        """The queue of a mapping. Nothing is called yet."""
        if mapping.source.kind is not SourceKind.SQS:
            raise ValueError(f"{mapping.source.arn} is a stream")
        clients = self._of(mapping.source)
        return sqs.SqsSource(mapping.source, clients, self._clock, windowed=mapping.batch.window > 0)

    def _of(self, source: SourceSpec) -> AwsClients:
        """Those with the credentials that the source is read with."""
        return self._clients.acting_as(source.role, source.region)
