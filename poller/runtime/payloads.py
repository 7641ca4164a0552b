"""Payloads in the log, for whoever has asked for them (`log.payloads`): an event of each invocation, and of what failed
the answer. Set by `telemetry.configure_logging`, which also masks the secrets of the config in them and cuts them off.
"""

import structlog

from poller.core.model import Delivered, Invocation, Mapping, Outcome, Reply

SENT, ANSWERED = "invocation_payload", "invocation_answer"
_log = structlog.get_logger(__name__)


class PayloadLog:
    """`is_on` is looked at first: while it is off an invocation costs nothing more than that."""

    __slots__ = ("is_on",)

    def __init__(self) -> None:
        self.is_on = False

    def sent(self, mapping: Mapping, call: Invocation) -> None:
        """Before the target is called."""
        _log.debug(
            SENT,
            **_ids(mapping, call),
            attempt=call.attempt,
            bytes=len(call.payload),
            payload=call.payload.decode(errors="replace"),
        )

    def answered(self, mapping: Mapping, call: Invocation, reply: Reply, outcome: Outcome) -> None:
        """After it; nothing of a batch that is settled."""
        if not isinstance(outcome, Delivered):
            _log.debug(
                ANSWERED,
                **_ids(mapping, call),
                status=reply.status_code,
                bytes=len(reply.body),
                payload=reply.body.decode(errors="replace"),
            )


def _ids(mapping: Mapping, call: Invocation) -> dict[str, str]:
    return {"mapping": mapping.id, "function": mapping.function.name, "request_id": call.request_id}


payload_log = PayloadLog()
"""The process's."""
