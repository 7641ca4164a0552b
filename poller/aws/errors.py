"""AWS's error codes as what the caller does about them: one table for all services, a few lines for each adapter."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError

from poller.aws.lean import EXPIRED_TOKEN_CODES, AwsError, safe_text
from poller.errors import AccessDenied, PollerError, SourceGone, SourceThrottled, SourceUnavailable

ErrorTable: TypeAlias = Mapping[str, type[PollerError]]

_THROTTLED = (
    "BandwidthLimitExceeded",
    "KMSThrottlingException",
    "KmsThrottled",
    "LimitExceededException",
    "OverLimit",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
)
_DENIED = (
    "AccessDenied",
    "AccessDeniedException",
    "AuthFailure",
    "IncompleteSignature",
    "IncompleteSignatureException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidSignatureException",
    "KMSAccessDeniedException",
    "KMSDisabledException",
    "KMSInvalidStateException",
    "KMSNotFoundException",
    "KMSOptInRequired",
    "KmsAccessDenied",
    "KmsDisabled",
    "KmsInvalidKeyUsage",
    "KmsInvalidState",
    "KmsNotFound",
    "KmsOptInRequired",
    "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
    "NotAuthorized",
    "OptInRequired",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
_GONE = (
    "NonExistentQueue",
    "QueueDeletedRecently",
    "QueueDoesNotExist",
    "ResourceNotFoundException",
)

_COMMON: ErrorTable = {
    **dict.fromkeys(_THROTTLED, SourceThrottled),
    **dict.fromkeys(_DENIED, AccessDenied),
    **dict.fromkeys(_GONE, SourceGone),
    # New credentials are loaded before the next call, so this is a passing trouble.
    **dict.fromkeys(EXPIRED_TOKEN_CODES, SourceUnavailable),
}


def aws_error(error: AwsError | ClientError) -> AwsError:
    """A cold call's error in the same words as the hot calls' own."""
    if isinstance(error, AwsError):
        return error
    details = error.response.get("Error", {})
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return AwsError(safe_text(str(details.get("Code", ""))), status, safe_text(str(details.get("Message", ""))))


def translate(error: AwsError, table: ErrorTable, what: str) -> PollerError:
    """The error that tells the caller what to do: by the adapter's table, the common one, then the HTTP status.

    Anything unknown is SourceUnavailable: backing off and trying again loses nothing.
    """
    code = error.code.rpartition(".")[2]  # AWS.SimpleQueueService.NonExistentQueue
    kind = table.get(code) or _COMMON.get(code)
    if kind is None:
        kind = {401: AccessDenied, 403: AccessDenied, 429: SourceThrottled}.get(error.status, SourceUnavailable)
    return kind(f"{what}: {error}")


def _why(error: object) -> str:
    """Why there is no connection, in words without an address: aiohttp's own have it twice."""
    match getattr(error, "os_error", error):
        case socket.gaierror():
            return "its name did not resolve"
        case OSError(errno=int(number)):
            return os.strerror(number).lower()
        case _:
            return "no connection"


@contextmanager
def translated(what: str, table: ErrorTable) -> Iterator[None]:
    """Turn what AWS calls raise into the errors of `poller.errors`; `what` begins the message, e.g. `ListShards`.

    The cause is dropped on purpose: botocore's may hold session tokens and proxy passwords.
    """
    try:
        yield
    except (AwsError, ClientError) as error:
        raise translate(aws_error(error), table, what) from None
    except (NoCredentialsError, PartialCredentialsError, NoAuthTokenError):
        raise AccessDenied(f"{what}: no AWS credentials found") from None
    except CredentialRetrievalError:
        raise SourceUnavailable(f"{what}: AWS credentials cannot be loaded") from None
    except ResponseParserError:  # its text quotes the answer
        raise SourceUnavailable(f"{what}: the answer cannot be read") from None
    except EndpointConnectionError as error:
        raise SourceUnavailable(f"{what}: {safe_text(str(error))}: {_why(error.kwargs.get('error'))}") from None
    except (BotoCoreError, TimeoutError) as error:
        raise SourceUnavailable(f"{what}: {safe_text(str(error)) or type(error).__name__}") from None
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError):
        # What botocore's parsers raise for an answer of another form, and whoever reads what they made of it.
        raise SourceUnavailable(f"{what}: the answer cannot be read") from None
