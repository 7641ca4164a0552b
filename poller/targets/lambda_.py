"""Lambda functions: the Invoke API, synchronously, as semantics 13 has it."""

import asyncio
import re
from typing import Final
from urllib.parse import quote

import aiohttp

from poller.aws.lean import LeanAnswer, describe, parse_error
from poller.aws.session import AwsClients
from poller.core.model import Invocation, Reply, ReplyStatus
from poller.errors import PollerError
from poller.ports import Clock
from poller.settings import LambdaFunction
from poller.targets.answers import notice_closed, retry_after, why_no_connection

# Lambda ends a function at its own timeout and says so; this much later nothing can come any more.
_GRACE: Final = 5.0
_CONNECT_TIMEOUT: Final = 10.0
_CHECK_TIMEOUT: Final = 10.0

_REGION: Final = re.compile(r"arn:[^:]+:lambda:([^:]+):")

# Their texts name the caller, the action and the function. Others may quote the payload or the signed request.
_SAFE_MESSAGES: Final = frozenset(("AccessDeniedException", "ResourceNotFoundException", "TooManyRequestsException"))


class LambdaTarget:
    """A `Target` that invokes a Lambda function. The connections are those of the `AwsClients`."""

    def __init__(self, settings: LambdaFunction, region: str, clients: AwsClients, clock: Clock) -> None:
        """`region`: where the function is unless its ARN says so."""
        self.capacity = settings.max_concurrency
        self.timeout = settings.timeout + _GRACE
        self._connect_timeout = min(_CONNECT_TIMEOUT, self.timeout / 2)  # ends before the timeout: nothing was sent
        self._clients = clients
        self._clock = clock
        self._where = f"Lambda function {settings.arn}"
        arn = _REGION.match(settings.arn)
        self._region = arn[1] if arn else region
        self._path = f"/2015-03-31/functions/{quote(settings.arn, safe='')}/invocations"

    async def invoke(self, invocation: Invocation) -> Reply:
        """One Invoke, never repeated. Never raises for what the function, Lambda or the network does."""
        headers = {"Content-Type": "application/json", "X-Amz-Invocation-Type": "RequestResponse"}
        # It comes with a record, so from anybody: what would break the header is not passed on.
        xray = invocation.trace.xray
        if xray and xray.isascii() and xray.isprintable():
            headers["X-Amzn-Trace-Id"] = xray
        await notice_closed()
        try:
            # Credentials first, in a time limit of their own: until they are there nothing can have been sent.
            async with asyncio.timeout(self._connect_timeout):
                lean = await self._clients.lean("lambda", self._region)
                await self._clients.credentials.frozen()
        except TimeoutError:
            return self._unreachable(f"no AWS credentials to sign with within {self._connect_timeout:g} s")
        except PollerError as error:
            return self._unreachable(str(error))
        try:
            answer = await lean.request(
                "POST", self._path, headers, invocation.payload, self.timeout, self._connect_timeout
            )
        except PollerError as error:  # credentials that were lost in between
            return self._unreachable(str(error))
        except aiohttp.ConnectionTimeoutError:
            return self._unreachable(f"no connection within {self._connect_timeout:g} s")
        except (aiohttp.ClientConnectorError, aiohttp.ClientConnectorCertificateError) as error:
            return self._unreachable(why_no_connection(error))
        except TimeoutError:
            return Reply(ReplyStatus.TIMEOUT, error=f"{self._where} did not answer within {self.timeout:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Reply(ReplyStatus.FUNCTION_ERROR, error=f"{self._where}: the connection broke: {describe(error)}")
        return self._judge(answer)

    async def check(self) -> str | None:
        """A DryRun: does the function exist, and may we invoke it?"""
        headers = {"Content-Type": "application/json", "X-Amz-Invocation-Type": "DryRun"}
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                lean = await self._clients.lean("lambda", self._region)
                answer = await lean.request("POST", self._path, headers, b"{}", _CHECK_TIMEOUT, _CHECK_TIMEOUT)
        except PollerError as error:
            return f"{self._where}: {error}"
        except (aiohttp.ClientError, OSError) as error:
            return f"{self._where}: {why_no_connection(error)}"
        if answer.status != 204:
            return self._refusal(answer)
        return None

    async def close(self) -> None:
        """Nothing: the connections belong to the `AwsClients`."""

    def _judge(self, answer: LeanAnswer) -> Reply:
        """The status table of semantics 13."""
        status, headers, body = answer
        version = headers.get("X-Amz-Executed-Version") or "$LATEST"
        if 200 <= status < 300:
            if "X-Amz-Function-Error" in headers:  # its presence counts, not its value
                error = f"{self._where} answered with a function error"
                return Reply(ReplyStatus.FUNCTION_ERROR, body, error, status, version)
            return Reply(ReplyStatus.OK, body, status_code=status, executed_version=version)
        error = self._refusal(answer)
        if status == 429:
            seconds = retry_after(headers.get("Retry-After"), self._clock.now())
            return Reply(ReplyStatus.THROTTLED, error=error, status_code=status, retry_after=seconds)
        if status == 413:
            return Reply(ReplyStatus.TOO_LARGE, error=error, status_code=status)
        return Reply(ReplyStatus.UNREACHABLE, error=error, status_code=status)

    def _refusal(self, answer: LeanAnswer) -> str:
        error = parse_error(*answer)
        message = f": {error.message}" if error.code in _SAFE_MESSAGES and error.message else ""
        return f"{self._where}: {error.code} ({answer.status}){message}"

    def _unreachable(self, reason: str) -> Reply:
        return Reply(ReplyStatus.UNREACHABLE, error=f"{self._where}: {reason}")
