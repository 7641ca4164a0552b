"""An AWS service as the place of failure records: calls to it, and what goes wrong with them in words."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from poller.aws.errors import ErrorTable, aws_error, translate, translated
from poller.aws.lean import AwsError
from poller.aws.session import AwsClients
from poller.errors import (
    AccessDenied,
    DestinationFailed,
    PollerError,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)

# What botocore's parsers raise for an answer that is not in the service's form, a proxy's for one.
_UNREADABLE = (ResponseParserError, AttributeError, KeyError, TypeError, UnicodeDecodeError)

_ERRORS: ErrorTable = {
    "AllAccessDisabled": AccessDenied,  # S3
    "AuthorizationError": AccessDenied,  # SNS
    "KMSAccessDenied": AccessDenied,
    "KMSDisabled": AccessDenied,
    "KMSInvalidState": AccessDenied,
    "KMSNotFound": AccessDenied,
    "KMSOptInRequired": AccessDenied,
    "KMSThrottling": SourceThrottled,
    "NoSuchBucket": SourceGone,
    "NotFound": SourceGone,  # SNS
    "404": SourceGone,  # HeadBucket, whose answers have no body
    "Throttled": SourceThrottled,  # SNS
    "ThrottledException": SourceThrottled,
}


@dataclass(frozen=True, slots=True)
class Words:
    """What a person is told. `gone`: what to do about a thing that does not exist. `key`: rights on a KMS key.
    `unreadable`: what an answer that cannot be read leaves open.
    """

    gone: str
    key: str
    unreadable: str


SENDING = Words(
    gone="make it again, or give the mapping another destination",
    key="kms:GenerateDataKey and kms:Decrypt",
    unreadable=", so it is not known to be taken",
)
READING = Words(gone="look at its name, Region and account", key="kms:Decrypt", unreadable="")


@dataclass(frozen=True, slots=True)
class Service:
    """One AWS resource and the client of its service. `where`: the resource, for a person.

    `region` None: what the standard chain says. `timeout`: seconds of one call, with its `attempts`.
    """

    name: str
    region: str | None
    where: str
    clients: AwsClients
    timeout: float
    attempts: int = 1
    words: Words = SENDING

    @asynccontextmanager
    async def calling(self, action: str) -> AsyncIterator[Any]:
        """The client, for one call. Whatever goes wrong is DestinationFailed; `action`: the right that the call needs.

        AWS's own words are left out where they may quote what was sent.
        """
        try:
            with translated(action, _ERRORS):
                try:
                    async with asyncio.timeout(self.timeout):
                        yield await self.clients.client(self.name, self.region, attempts=self.attempts)
                except TimeoutError:
                    raise SourceUnavailable(f"{action}: no answer within {self.timeout:g} s") from None
                except _UNREADABLE:
                    raise self.unreadable(action) from None
                except ClientError as error:
                    raise _without_quotes(aws_error(error)) from None
        except DestinationFailed:
            raise
        except SourceGone as error:
            raise DestinationFailed(f"{self.where}: it does not exist ({error}); {self.words.gone}") from None
        except AccessDenied as error:
            key = f" and {self.words.key} on its key" if "kms" in str(error).lower() else ""
            raise DestinationFailed(
                f"{self.where}: access denied ({error}); the poller's credentials need {action} on it{key}"
            ) from None
        except PollerError as error:
            raise DestinationFailed(f"{self.where}: {error}") from None

    def unreadable(self, action: str) -> DestinationFailed:
        """An answer that was cut off, or that does not say that what was asked for was done."""
        return DestinationFailed(f"{self.where}: {action}: the answer cannot be read{self.words.unreadable}")

    async def problem(self, action: str, operation: str, **request: str | list[str]) -> str | None:
        """What is wrong with a call that only looks; None when it is answered."""
        try:
            async with self.calling(action) as client:
                await getattr(client, operation)(**request)
        except DestinationFailed as error:
            return str(error)
        return None


def _without_quotes(error: AwsError) -> AwsError:
    """Only what a refusal of the caller, a missing thing or a throttle says is known to hold no part of the request."""
    if isinstance(translate(error, _ERRORS, ""), SourceUnavailable):
        return AwsError(error.code, error.status, f"HTTP status {error.status}")
    return error
