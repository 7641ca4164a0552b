"""What redrive works with: failure records where they lie."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Found:
    """Something that lies in a box: a failure record, or not. `name` tells it from the others to a person (message id,
    object key, file name, store key). `problem`: why the body could not be had and is empty. `mapping`: the UUID that
    the name tells, if any. `kept`: the store's whole entry, where it is one.
    """

    name: str
    body: bytes
    problem: str = ""
    mapping: str = ""
    kept: dict[str, Any] | None = field(default=None, compare=False)


class Box(Protocol):
    """Where failure records lie. Every method may raise PollerError: what cannot be reached, and what to do."""

    where: str
    """For a person: the ARN, `s3://BUCKET/PREFIX`, the directory or the store."""
    lock: Path | None
    """The file that a run locks, so that there is one at a time; None where a place hands out each record to one (SQS)
    or has nothing that could be locked (S3, a shared store).
    """

    async def count(self) -> int | None:
        """About how many lie there, for a progress bar; None when that is not known in advance."""
        ...

    def read(self) -> AsyncIterator[Found]:
        """Everything that lies there, each once, oldest first as far as the box can tell. Ends; what is put there
        while it is read may or may not be seen.
        """
        ...

    async def keep(self) -> None:
        """Keep others from what was read and not left or removed, until cancelled. A box that nobody else reads from
        returns at once.
        """
        ...

    def leave(self, found: Found) -> None:
        """Nothing more will be done with it in this run."""
        ...

    async def hold(self, found: Found, seconds: float) -> bool:
        """Keep others from it for so long, from now. False: it is somebody else's by now, or gone; leave it."""
        ...

    async def remove(self, found: Found) -> None:
        """Delete it for good: its batch was delivered. Gone already is fine."""
        ...

    async def close(self) -> None:
        """Give back what was read and not removed, so that it is there for others at once; release the rest."""
        ...
