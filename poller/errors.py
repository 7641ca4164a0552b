"""Every error of the poller: one class for each thing that a caller can do about it.

A failing function is none of these: `Target.invoke` answers with a `Reply`, which `judge` turns into an outcome.
"""

from collections.abc import Sequence


class PollerError(Exception):
    """Base of all errors that the poller raises itself."""


class ConfigError(PollerError):
    """The document is refused. Carries every mistake at once, each `place: what was wrong; what would be right`."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


class SourceThrottled(PollerError):  # noqa: N818
    """The source asks for fewer calls: back off, keep the iterator."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SourceUnavailable(PollerError):  # noqa: N818
    """The call did not get a usable answer (network, 5xx, truncated body): back off, keep the iterator."""


class IteratorExpired(PollerError):  # noqa: N818
    """The read token is too old: ask for a new one at the position the shard is at."""


class PositionTrimmed(PollerError):  # noqa: N818
    """The position has left retention: go on at TRIM_HORIZON and count what was lost."""


class SourceGone(PollerError):  # noqa: N818
    """The stream, shard or queue does not exist (any more): show it, keep trying slowly, spend no attempts."""


class AccessDenied(PollerError):  # noqa: N818
    """The credentials may not do this: show it, keep trying slowly, spend no attempts."""


class StoreUnavailable(PollerError):  # noqa: N818
    """The store did not answer: try again; what could not be saved is delivered again after a crash."""


class StoreInUse(PollerError):  # noqa: N818
    """Another running daemon holds this store. Names the file and the other process."""


class StoreIncompatible(PollerError):  # noqa: N818
    """The store was written by a version this one cannot read. Names both versions."""


class DestinationFailed(PollerError):  # noqa: N818
    """A failure destination did not take a record, or does not give one back: try again, after `retry_after` seconds
    if it said so.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ApiError(PollerError):
    """A mapping operation is refused: `code` is AWS's error code, `status` the HTTP status, the message AWS's text."""

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.message = message
