"""The event source mappings of a real account."""

import asyncio
import os
import re
import shlex
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiobotocore.session import AioSession

from poller.aws.errors import translated
from poller.aws.session import COLD_TIMEOUT, AwsClients
from poller.clock import wall_clock
from poller.core.model import SourceKind
from poller.errors import AccessDenied, ConfigError, SourceGone, SourceUnavailable
from poller.importing.judge import Candidate, Function, Judge
from poller.importing.render import Imported, render
from poller.importing.values import shown
from poller.mappings import parse_source
from poller.settings import AwsSettings

_ATTEMPTS = 4  # control-plane calls share 15 requests a second with everybody in the account
_PAGE = 100  # what AWS gives at most
_NOT_ECHOED = frozenset(  # members of the answer that are no members of a request
    (
        *("EventSourceMappingArn", "FunctionArn", "LastModified", "LastProcessingResult", "State"),
        *("StateTransitionReason", "FilterCriteriaError", "StartingPosition", "StartingPositionTimestamp"),
    )
)
_OFF = frozenset({"Disabled", "Disabling"})


@dataclass(frozen=True, slots=True)
class AccountOptions:
    """`region` None: that of the environment or the profile. `function`: only its mappings; "": all.

    `overlap`: seconds before now where a Kinesis mapping starts to read.
    """

    region: str | None = None
    endpoint_url: str | None = None
    function: str = ""
    overlap: float = 3600.0


def import_account(options: AccountOptions) -> Imported:
    """The mappings of the account that the standard chain's credentials are of. PollerError."""
    return asyncio.run(_import(options))


async def _import(options: AccountOptions) -> Imported:
    async with AwsClients(AwsSettings(options.region, options.endpoint_url)) as clients:
        region = options.region or _region()
        client = await clients.client("lambda", region, _ATTEMPTS)
        return await read_account(client, region, options, wall_clock())


async def read_account(client: Any, region: str, options: AccountOptions, now: float) -> Imported:
    """The same through a client of Lambda. `now`: epoch seconds."""
    account = _Account(client, region, options, now)
    judged = Judge(now).judge([found async for found in account.candidates()])
    if not judged.items:
        wanted = f" of the function {shown(options.function)}" if options.function else ""
        remedy = "check --region, --function and whose credentials these are"
        said = f"no event source mappings{wanted} in {region} that esm-poller can poll; {remedy}"
        raise ConfigError([*judged.foreign, said])
    aws = {"region": region} | ({"endpoint_url": options.endpoint_url} if options.endpoint_url else {})
    return render(judged, f"the event source mappings of {region}", aws, [*_ADVICE, *account.advice()])


_ADVICE = (
    "AWS polls these sources until its own mappings are disabled; until then a queue's messages go to either of the "
    "two, a stream's records to both.\n"
    "AWS's position in a stream cannot be read. Start the poller, see in AWS's IteratorAge metric that its mapping is "
    "at the tip, then disable it."
).splitlines()


def _region() -> str:
    found = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found = found or AioSession().get_config_variable("region")
    if not found:
        raise ConfigError(["no AWS Region: give --region, or set AWS_REGION"])
    return str(found)


class _Account:
    """One import. `now`: epoch seconds of its begin."""

    def __init__(self, client: Any, region: str, options: AccountOptions, now: float) -> None:
        self._now = now
        self._client = client
        self._region = region
        self._options = options
        self._timeouts: dict[str, int | None] = {}
        self._denied = ""
        self._running: list[str] = []

    async def candidates(self) -> AsyncIterator[Candidate]:
        """Every mapping that is asked for, in AWS's order."""
        async for found in self._mappings():
            arn = str(found.get("FunctionArn") or "")
            if not self._is_asked_for(arn):
                continue
            where = f"mapping {shown(found.get('UUID'), 60)} of {shown(arn.partition(':function:')[2] or arn, 150)}"
            candidate = Candidate(where, {}, Function(arn, "function", await self._timeout(arn)))
            candidate.members = {name: value for name, value in found.items() if name not in _NOT_ECHOED}
            self._carry(found, candidate)
            yield candidate

    def advice(self) -> list[str]:
        """What is to be done with what was found."""
        said = []
        if self._denied:
            said.append(f"timeout_seconds could not be read: {self._denied}")
        if self._running:
            said.append("At the switch-over:")
            said += [f"  {command}" for command in self._running]
        return said

    def _is_asked_for(self, arn: str) -> bool:
        """A name means every qualifier of it; with a qualifier only that one."""
        asked = self._options.function
        if not asked.startswith("arn:"):
            arn, asked = arn.partition(":function:")[2], asked.rpartition("function:")[2]
        return not asked or arn == asked or arn.startswith(f"{asked}:")

    async def _mappings(self) -> AsyncIterator[dict[str, Any]]:
        """Every page. Filtered here: AWS's FunctionName does not find the mappings of the function's aliases."""
        marker = ""
        seen = set()
        while True:
            with translated("ListEventSourceMappings", {}):
                async with asyncio.timeout(COLD_TIMEOUT):
                    page = await self._client.list_event_source_mappings(
                        MaxItems=_PAGE, **({"Marker": marker} if marker else {})
                    )
            for found in page.get("EventSourceMappings", ()):
                yield found
            marker = page.get("NextMarker") or ""
            if not marker:
                return
            if marker in seen:
                raise SourceUnavailable("ListEventSourceMappings: the same page came twice")
            seen.add(marker)

    async def _timeout(self, arn: str) -> int | None:
        """The function's own timeout; None when it cannot be read, which is no failure."""
        if not arn or self._denied:
            return None
        if arn not in self._timeouts:
            self._timeouts[arn] = None
            try:
                with translated("GetFunctionConfiguration", {}):
                    async with asyncio.timeout(COLD_TIMEOUT):
                        answer = await self._client.get_function_configuration(FunctionName=arn)
                self._timeouts[arn] = answer.get("Timeout")
            except AccessDenied as error:
                self._denied = str(error)
            except SourceGone:
                pass  # a mapping may outlive its function
        return self._timeouts[arn]

    def _carry(self, found: Mapping[str, Any], candidate: Candidate) -> None:
        members = candidate.members
        if error := found.get("FilterCriteriaError"):
            text = shown(error.get("Message") or error.get("ErrorCode"))
            candidate.refused.append(f"its filters cannot be read, so it would deliver everything: {text}")
        state = str(found.get("State"))
        if state == "Deleting":
            candidate.refused.append("AWS is deleting it")
        members["Enabled"] = state not in _OFF
        try:
            source = parse_source(str(found.get("EventSourceArn")))
        except ValueError:
            return
        if source.kind is not SourceKind.SQS:
            self._start(found, candidate, source.kind)
        if source.fan_out:
            candidate.notes.append(
                "a registered consumer has one reader for each shard: disable AWS's mapping before the poller starts"
            )
        if members["Enabled"] and state != "Deleting":
            command = f"aws lambda update-event-source-mapping --region {shlex.quote(self._region)}"
            if self._options.endpoint_url:
                command += f" --endpoint-url {shlex.quote(self._options.endpoint_url)}"
            self._running.append(f"{command} --uuid {shlex.quote(shown(found.get('UUID'), 60))} --no-enabled")

    def _start(self, found: Mapping[str, Any], candidate: Candidate, kind: SourceKind) -> None:
        """Where to read from, as AWS's position is unknown. What might be missed is worse than what comes twice."""
        members, notes = candidate.members, candidate.notes
        own = shown(found.get("StartingPosition"), 40)
        result = str(found.get("LastProcessingResult") or "")
        if kind is SourceKind.DYNAMODB:
            why = "a DynamoDB stream has no other position in the past"
        elif not members["Enabled"]:
            why = "it is disabled at AWS, and where it stopped cannot be read"
        elif re.match("PROBLEM", result, re.IGNORECASE):
            why = "AWS's mapping has a problem and may be far behind"
        else:
            moment = datetime.fromtimestamp(max(self._now - self._options.overlap, 0), UTC)
            members["StartingPosition"] = "AT_TIMESTAMP"
            members["StartingPositionTimestamp"] = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
            notes.append(
                f"starts {self._options.overlap:g} s before this import (--overlap): records since then are delivered "
                f"again. If AWS's mapping is further behind, write TRIM_HORIZON. AWS's own StartingPosition was {own}"
            )
            return
        members["StartingPosition"] = "TRIM_HORIZON"
        notes.append(
            f"starts at TRIM_HORIZON: {why}. All records that the stream retains are delivered again. "
            f"AWS's own StartingPosition was {own}"
        )
