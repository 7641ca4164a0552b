"""Credentials of another role, by AssumeRole of STS: for sources that the daemon's own credentials may not read."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import structlog
from aiobotocore.credentials import AioDeferredRefreshableCredentials

from poller.aws.errors import translated
from poller.clock import wall_clock
from poller.errors import AccessDenied, PollerError, SourceUnavailable

_TIMEOUT = 60.0  # of one call with its repeat
_INTERVAL = 10.0  # between two calls for one role, whatever asks and however short its credentials live
_MARGIN = 1.0  # seconds that a signature may travel
_log = structlog.get_logger(__name__)


class AssumedRole:
    """One role, for one AioSession: takes the place of its chain of credential providers.

    botocore's refreshable credentials ask for new ones 15 minutes before the old end.
    """

    def __init__(self, arn: str, session_name: str, sts: Callable[[], Awaitable[Any]]) -> None:
        """`sts` makes the client; its errors are those of `AwsClients.client`."""
        self._arn = arn
        self._session_name = session_name
        self._sts = sts
        self._lock = asyncio.Lock()
        self._next_at = 0.0  # when STS may be asked again, in the loop's time
        self._problem: PollerError | None = None
        self._answer: dict[str, str] | None = None

    async def load_credentials(self) -> AioDeferredRefreshableCredentials:
        """What the session's clients sign with. STS is asked at the first use."""
        return AioDeferredRefreshableCredentials(self._refresh, "assume-role")

    def check(self) -> None:
        """PollerError: the last call has failed, and it is too early for the next."""
        if self._problem is not None and self._answer is None and asyncio.get_running_loop().time() < self._next_at:
            raise self._problem.with_traceback(None)  # which would grow with every caller

    async def _refresh(self) -> dict[str, str]:
        """New ones, in botocore's form. While the old are good a failure is logged and they stay; else AccessDenied or
        SourceUnavailable.
        """
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if self._answer is not None and _ends_at(self._answer) <= wall_clock():
                self._answer = None
            if now >= self._next_at:
                self._problem = None
                try:
                    self._answer = await self._assume()
                except PollerError as error:
                    self._problem = error
                    if self._answer is not None:
                        _log.warning("role_not_renewed", role=self._arn, error=str(error), meaning="the old ones hold")
                finally:
                    self._next_at = asyncio.get_running_loop().time() + _INTERVAL
            if self._answer is None:
                problem = self._problem or SourceUnavailable(f"AssumeRole of {self._arn}: its credentials have expired")
                raise problem.with_traceback(None)
            return self._answer

    async def _assume(self) -> dict[str, str]:
        what = f"AssumeRole of {self._arn}"
        try:
            client = await self._sts()
            with translated(what, {}):
                async with asyncio.timeout(_TIMEOUT):
                    answer = await client.assume_role(RoleArn=self._arn, RoleSessionName=self._session_name)
        except AccessDenied as error:
            raise AccessDenied(
                f"{error}; the daemon's credentials need sts:AssumeRole on it, and its trust policy must name them"
            ) from None
        try:
            given = answer["Credentials"]
            return {
                "access_key": given["AccessKeyId"],
                "secret_key": given["SecretAccessKey"],
                "token": given["SessionToken"],
                "expiry_time": given["Expiration"].isoformat(),
            }
        except (KeyError, TypeError, AttributeError):
            raise SourceUnavailable(f"{what}: the answer cannot be read") from None


def _ends_at(answer: dict[str, str]) -> float:
    return datetime.fromisoformat(answer["expiry_time"]).timestamp() - _MARGIN
