"""Credentials of a role, without an STS."""

from types import TracebackType
from typing import Any

import pytest

from poller.aws.role import AssumedRole
from poller.errors import AccessDenied


def length(trace: TracebackType | None) -> int:
    found = 0
    while trace is not None:
        found, trace = found + 1, trace.tb_next
    return found


async def test_a_refusal_that_is_told_often_does_not_grow() -> None:
    """Every reader of every shard gets it until STS is asked again; what called them must not stay in memory."""

    async def sts() -> Any:
        raise AccessDenied("no")

    role = AssumedRole("arn:aws:iam::123456789012:role/r", "s", sts)
    credentials = await role.load_credentials()
    lengths = []
    for _ in range(5):
        with pytest.raises(AccessDenied) as refused:
            await credentials.get_frozen_credentials()
        with pytest.raises(AccessDenied) as told:
            role.check()
        lengths.append((length(refused.value.__traceback__), length(told.value.__traceback__)))
    assert lengths[1:] == lengths[1:2] * 4
