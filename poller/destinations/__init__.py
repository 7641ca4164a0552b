"""Where discarded batches are reported: SQS, SNS, S3, EventBridge, HTTP, a directory."""

from poller.aws.session import AwsClients
from poller.destinations import aws
from poller.destinations.file import FileDestination
from poller.destinations.http import HttpDestination
from poller.ports import Destination

_CALL_TIMEOUT = 30.0


class Destinations:
    """The destinations of the process: mappings that name the same one share it. `clients` must outlive them."""

    def __init__(self, clients: AwsClients, timeout: float = _CALL_TIMEOUT) -> None:
        """`timeout`: seconds that one call of a destination may take, connecting and its answer included."""
        self._clients = clients
        self._timeout = timeout
        self._open: dict[tuple[str, str], Destination] = {}

    def open(self, target: str, source_region: str) -> Destination:
        """The destination that an ARN or URL names. Needs no network. ConfigError when it names none.

        `source_region`: the region of the mapping's source, where an S3 bucket is looked for first: its ARN has none.
        """
        key = (target, source_region)
        if key not in self._open:
            if target.startswith("arn:"):
                made: Destination = aws.open_destination(target, source_region, self._clients, self._timeout)
            elif target.startswith("file:"):
                made = FileDestination(target, self._timeout)
            else:
                made = HttpDestination(target, self._timeout)
            self._open[key] = made
        return self._open[key]

    async def close(self) -> None:
        """Close them all; their calls must have ended."""
        for destination in self._open.values():
            await destination.close()
        self._open.clear()
