"""What a queue is called: shared by the queues that are read and those that get failure records."""

import asyncio

from poller.aws.errors import translated
from poller.aws.session import COLD_TIMEOUT, AwsClients
from poller.errors import AccessDenied, SourceUnavailable


async def queue_url(clients: AwsClients, region: str | None, account: str, name: str) -> str:
    """The queue's URL. SourceGone, SourceThrottled, SourceUnavailable; no right to ask is no error."""
    client = await clients.client("sqs", region)
    try:
        with translated("GetQueueUrl", {}):
            async with asyncio.timeout(COLD_TIMEOUT):
                answer = await client.get_queue_url(QueueName=name, QueueOwnerAWSAccountId=account)
    except AccessDenied:
        # AWS's own role for SQS mappings has no sqs:GetQueueUrl; the URL's form is fixed.
        return f"{client.meta.endpoint_url.rstrip('/')}/{account}/{name}"
    if not (url := answer.get("QueueUrl")):
        raise SourceUnavailable("GetQueueUrl: the answer has no QueueUrl")
    return str(url)
