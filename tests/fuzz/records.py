"""Failure records, ours and Lambda's, as queues, buckets, directories and the store give them back."""

import json
import tempfile
from pathlib import Path

from poller.core.model import Checkpoint, Position, PositionKind
from poller.core.notices import FailureRecord, parse, parse_kept
from poller.redrive.boxes import DirectoryBox, _record_of
from poller.redrive.model import Found
from poller.redrive.run import read
from tests.fuzz.kit import Target, run, silent

_CHECKPOINTS = (
    Checkpoint(Position(PositionKind.TRIM_HORIZON)),
    Checkpoint(Position(PositionKind.AT, "5"), ((7, 9), (3,))),
    Checkpoint(Position(PositionKind.AFTER, "9" * 56), window='60.0\n{"a":1}'),
    Checkpoint(Position(PositionKind.END)),
)


def _check(record: FailureRecord) -> None:
    """What a redrive relies on: names in one line, numbers that are numbers, an event that is one."""
    names = (record.request_id, record.function_arn, record.condition, record.stream_arn, record.shard)
    assert all(name and name.isprintable() for name in (*names, record.kept_as or "-"))
    assert record.count == 0 or (int(record.start) >= 0 and int(record.end) >= 0)
    assert 0 <= record.at < 1e12
    assert record.attempts >= 0
    if record.payload is not None:
        assert isinstance(json.loads(record.payload)["Records"], list)
    if record.window is not None:
        assert not record.window.state or isinstance(json.loads(record.window.state), dict)


def _refused(error: ValueError) -> None:
    """In one short line, which quotes nothing of the record."""
    assert type(error) is ValueError
    silent(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 200


def _read(body: str | bytes) -> None:
    try:
        record = parse(body)
    except ValueError as error:
        _refused(error)
    else:
        _check(record)


def record(document: bytes) -> None:
    """One record, as bytes and as text."""
    _read(document)
    _read(document.decode(errors="replace"))


def kept(document: bytes) -> None:
    """The store's entry of a discarded batch, perhaps edited."""
    try:
        found = json.loads(document)
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return
    _read(_record_of(found))
    try:
        entry = parse_kept(found)
    except ValueError as error:
        _refused(error)
        return
    for checkpoint in _CHECKPOINTS:
        entry.is_settled(checkpoint)
    assert all(int(each) >= 0 for each in entry.ids)


def file(document: bytes) -> None:
    """A file in a directory, with the name in its first line."""
    name, _, body = document.partition(b"\n")
    text = name.decode(errors="replace")
    if not text or "/" in text or "\0" in text or len(text.encode()) > 200:
        return

    async def listed(folder: str) -> list[Found]:
        return [found async for found in DirectoryBox(Path(folder), None).read()]

    with tempfile.TemporaryDirectory() as folder:
        if text in {".", ".."}:
            return
        (Path(folder) / text).write_bytes(body)
        for found in run(listed(folder)):
            assert found.body == body
            _read(found.body)
            try:
                read(found)
            except ValueError as error:
                silent(error)


TARGET = Target("records", {"record": record, "kept": kept, "file": file})
