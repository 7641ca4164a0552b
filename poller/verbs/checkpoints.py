"""`checkpoints`."""

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from poller.clock import wall_clock
from poller.core.lineage import is_done
from poller.core.model import END, TRIM_HORIZON, Position, PositionKind, Row
from poller.errors import ConfigError, PollerError
from poller.verbs.common import OK, Verbs, add_config, add_verb, read_text

if TYPE_CHECKING:
    from poller.checkpoints import Checkpoints, Move, Shown
    from poller.kcl import Takeover

_T = TypeVar("_T")

_ABOUT = """\
Look at positions in the store, and move them, while the daemon is stopped or the mapping is paused (`poller pause`).
Of a mapping that runs use `poller seek`.

MAPPING is a UUID, the beginning of one, or the name of a function that one mapping has. A mapping that was taken out of
the config file keeps its positions, and is found by its UUID, until `reset`.
"""
_SET = """\
Move one shard. What lanes did ahead of the old position, and an open tumbling window, are dropped: everything from the
new position on is delivered, what was before it is not.
"""
_IMPORT = """\
Put what `export` wrote into the store: all or nothing. A mapping has exactly the shards of FILE then; those that come
to be later are read from their beginning.

With --kcl TABLE the positions of a KCL application (also one on the DynamoDB Streams Kinesis Adapter), from its lease
table, which is only read. Stop the application first: leases that have an owner are watched for 12 seconds. Records
that it has checkpointed are not delivered again.
"""


def add(verbs: Verbs) -> None:
    """Add it."""
    text = "look at and move positions in the store of a stopped daemon or a paused mapping"
    made = verbs.add_parser(
        "checkpoints", help=text, description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    family: Verbs = made.add_subparsers(metavar="VERB", required=True)
    listing = add_verb(family, "list", "show the positions of all mappings, or of one", _list)
    listing.add_argument("mapping", metavar="MAPPING", nargs="?")
    listing.add_argument("--json", action="store_true", help="one JSON array")
    get = add_verb(family, "get", "print one shard's row as JSON", _get)
    move = add_verb(family, "set", "move one shard", _set, description=_SET)
    for one in (get, move):
        one.add_argument("mapping", metavar="MAPPING")
        one.add_argument("shard", metavar="SHARD")
    where = move.add_mutually_exclusive_group(required=True)
    where.add_argument("--sequence", type=_sequence, metavar="N", help="read on with this record")
    where.add_argument("--after", type=_sequence, metavar="N", help="read on with the record after this one")
    where.add_argument("--trim-horizon", action="store_true", help="read on with the oldest record of the shard")
    where.add_argument("--end", action="store_true", help="the shard is read to its end: its children may start")
    reset = add_verb(
        family, "reset", "forget all positions of a mapping: it begins at its StartingPosition again", _reset
    )
    reset.add_argument("mapping", metavar="MAPPING")
    export = add_verb(family, "export", "print positions as one JSON document, for `import`", _export)
    export.add_argument("mappings", metavar="MAPPING", nargs="*", help="only these (default: all that have positions)")
    bring = add_verb(family, "import", "put what `export` wrote into the store", _import, description=_IMPORT)
    what = bring.add_mutually_exclusive_group(required=True)
    what.add_argument("file", metavar="FILE", nargs="?", help="or - for standard input")
    what.add_argument("--kcl", metavar="TABLE", help="the lease table of a KCL application, named like the application")
    bring.add_argument("--mapping", metavar="MAPPING", help="with --kcl: which one (default: the only one of a stream)")
    bring.add_argument("--region", metavar="R", help="with --kcl: of the table (default: that of the stream)")
    bring.add_argument(
        "--endpoint-url", metavar="U", help="with --kcl: of the table's DynamoDB (default: the config's)"
    )
    bring.add_argument("--overwrite", action="store_true", help="replace the positions that a mapping has already")
    bring.add_argument(
        "--force",
        action="store_true",
        help="import what belongs to a mapping or source that the config does not have; with --kcl: of an application "
        "that still runs, and what the stream does not have any more",
    )
    for one in (move, reset, bring):
        one.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    for one in (listing, get, move, reset, export, bring):
        add_config(one)


def _sequence(text: str) -> str:
    from poller.checkpoints import is_sequence

    if not is_sequence(text):
        raise argparse.ArgumentTypeError(f"{text} is not a sequence number; it has 1 to 128 digits")
    return text


def _over(
    given: argparse.Namespace,
    work: "Callable[[Checkpoints], Awaitable[_T]]",
    *,
    change: bool = False,
    make: bool | None = None,
) -> _T:
    """What `work` answers over the config's store. ConfigError: whatever it is that stopped it, exit code 2."""
    from poller.checkpoints import run
    from poller.config import find_path, load

    try:
        return run(load(find_path(given.config)), work, change=change, make=make)
    except ConfigError:
        raise
    except PollerError as error:
        raise ConfigError([f"poller checkpoints: {error}"]) from None


def _list(given: argparse.Namespace) -> int:
    async def look(checkpoints: "Checkpoints") -> list[str]:
        found = await checkpoints.look([given.mapping] if given.mapping else [])
        return [_json([each.describe() for each in found])] if given.json else list_lines(found)

    print("\n".join(_over(given, look)))
    return OK


def _json(document: Any) -> str:
    return json.dumps(document, indent=2)


def list_lines(found: "Sequence[Shown]") -> list[str]:
    """One line for each mapping, and one for each shard."""
    lines = []
    now = wall_clock()
    for each in found:
        if each.mapping is None:
            parts = [each.id, "no longer configured", each.source_arn]
        else:
            source = each.mapping.source
            state = "enabled" if each.mapping.enabled else "disabled"
            parts = [each.id, f"{source.kind:<8}", each.function, state, source.arn]
        if each.is_sought:
            parts.append("a seek waits for it to run")
        lines.append("  ".join(part for part in parts if part))
        if each.is_queue:
            lines.append("  a queue has no positions")
        elif each.mapping is not None and not each.rows:
            start = f"{each.mapping.start.kind} {each.mapping.start.value}".strip()
            lines.append(f"  no positions yet; it begins at {start}")
        lines += [_row_line(row, now) for row in each.rows.values()]
    return lines or ["no mappings"]


def _row_line(row: Row, now: float) -> str:
    position = row.checkpoint.position
    parts = [f"  {row.shard}", f"{position.kind} {position.value}".strip()]
    if 0 < row.saved_at < float("inf"):  # 0: nobody knows, see `poller.kcl`
        parts.append(f"saved {_age(now - row.saved_at)} ago")
    if not is_done(row):
        parts.append(f"owner {row.owner}" if row.owner else "free")
    if row.parents:
        parts.append(f"parents {', '.join(row.parents)}")
    if row.checkpoint.resume:
        parts.append(f"{' + '.join(str(len(vector)) for vector in row.checkpoint.resume)} lanes ahead")
    if row.checkpoint.window:
        parts.append(f"window open since {_moment(row.checkpoint.window.partition(chr(10))[0])}")
    return "  ".join(parts)


def _age(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _moment(text: str) -> str:
    try:
        return datetime.fromtimestamp(float(text), UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError):
        return f"{text}, which is no moment"


def _get(given: argparse.Namespace) -> int:
    print(_json(_over(given, lambda checkpoints: checkpoints.get(given.mapping, given.shard))))
    return OK


def _export(given: argparse.Namespace) -> int:
    print(_json(_over(given, lambda checkpoints: checkpoints.export(given.mappings))))
    return OK


def _set(given: argparse.Namespace) -> int:
    if given.sequence:
        to = Position(PositionKind.AT, given.sequence)
    elif given.after:
        to = Position(PositionKind.AFTER, given.after)
    else:
        to = END if given.end else TRIM_HORIZON
    dry = given.dry_run
    return _tell(
        _over(given, lambda checkpoints: checkpoints.move(given.mapping, given.shard, to, dry=dry), change=True),
        dry=dry,
    )


def _reset(given: argparse.Namespace) -> int:
    dry = given.dry_run
    return _tell(_over(given, lambda checkpoints: checkpoints.reset(given.mapping, dry=dry), change=True), dry=dry)


def _import(given: argparse.Namespace) -> int:
    dry = given.dry_run
    if given.kcl is not None:
        text, place = _take_over(given), f"table {given.kcl}"
    else:
        for option in ("mapping", "region", "endpoint_url"):
            if getattr(given, option) is not None:
                raise ConfigError([f"--{option.replace('_', '-')}: belongs to --kcl"])
        text = read_text("poller checkpoints import", given.file)
        place = "standard input" if given.file == "-" else given.file

    async def restore(checkpoints: "Checkpoints", *, dry: bool = False) -> "Sequence[Move]":
        return await checkpoints.restore(text, place, overwrite=given.overwrite, force=given.force, dry=dry)

    # Dry first, in any case: a document that is refused leaves no empty store behind.
    moves = _over(given, partial(restore, dry=True), change=True, make=False)
    return _tell(moves if dry else _over(given, restore, change=True, make=True), dry=dry)


def _take_over(given: argparse.Namespace) -> str:
    """What a KCL application's table says, as `export` would have written it. What one should know of it is told."""
    from poller.config import find_path, load
    from poller.kcl import Options, choose, take_over

    settings = load(find_path(given.config))
    options = Options(given.kcl, given.mapping or "", given.region, given.endpoint_url, force=given.force)

    async def read(checkpoints: "Checkpoints") -> "Takeover":
        found = await checkpoints.look([options.mapping] if options.mapping else [])
        return await take_over(settings, choose(found, options.mapping), options)

    taken = _over(given, read, make=False)
    for note in taken.notes:
        print(note, file=sys.stderr)
    return json.dumps(taken.document)


def _tell(moves: "Sequence[Move]", *, dry: bool) -> int:
    for move in moves:
        was, now = move.texts()
        print(f"{move.mapping}  {move.shard}  {was} -> {now}")
    count = f"{len(moves)} position{'' if len(moves) == 1 else 's'}"
    print(f"{count} would be changed" if dry else f"{count} changed")
    return OK
