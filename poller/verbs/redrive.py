"""`redrive`."""

import argparse

from poller.errors import ConfigError, PollerError
from poller.verbs.common import BAD_CONFIG, OK, Verbs, add_config, add_verb, count

_REDRIVE = """\
Deliver discarded batches again: read failure records, ours or Lambda's own, get their records (from the payload, else
from the stream), invoke the function, and remove each failure record once its batch has succeeded.

FROM is where they lie:
  store                         what the daemon's own store keeps, the last 10,000 batches of each mapping (the default)
  arn:aws:sqs:..., a queue URL  messages; also a queue that is subscribed to an SNS topic or a target of a bus
  s3://BUCKET[/PREFIX]          objects; the prefix is aws/lambda/ unless given; a bucket's ARN works too
  DIR or file:///DIR            *.json files
"""
_REDRIVE_EXITS = """\
Batches of a shard are delivered one after the other. A batch that fails stays, and the run goes on with the next.
Exit code: 0 all succeeded, 2 a mistake, or something was left.
"""


def add(verbs: Verbs) -> None:
    """Add it."""
    text = "deliver discarded batches again, or list them"
    made = add_verb(verbs, "redrive", text, _redrive, description=_REDRIVE, epilog=_REDRIVE_EXITS)
    add_config(made)
    made.add_argument("place", metavar="FROM", nargs="?", default="store", help="where they lie (default: store)")
    made.add_argument("--list", action="store_true", help="only show them")
    made.add_argument("--json", action="store_true", help="with --list: one JSON object a line")
    made.add_argument("--dry-run", action="store_true", help="read everything, invoke and remove nothing")
    made.add_argument("--mapping", default="", metavar="MAPPING", help="only those of one mapping")
    made.add_argument(
        "--request-id", action="append", default=[], metavar="ID", help="only this one; may be given several times"
    )
    made.add_argument("--to", default="", metavar="FUNCTION", help="invoke this function instead of the mapping's")
    made.add_argument("--rate", type=_rate, metavar="N", help="at most N invocations a second")
    made.add_argument(
        "--concurrency",
        type=_concurrency,
        default=1,
        metavar="N",
        help="so many at once, of different shards (default: 1)",
    )
    made.add_argument("--limit", type=count, metavar="N", help="end after N batches")
    made.add_argument("--partial", action="store_true", help="deliver what the stream still has of a trimmed batch")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0
    if not 0.001 <= rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of invocations a second from 0.001")
    return rate


def _concurrency(text: str) -> int:
    if (number := count(text)) > 1000:
        raise argparse.ArgumentTypeError(f"{text} at once is more than 1000")
    return number


def _redrive(given: argparse.Namespace) -> int:
    from poller.config import find_path, load
    from poller.redrive import Options, run

    if given.json and not given.list:
        raise ConfigError(["--json: belongs to --list"])
    options = Options(
        place=given.place,
        mapping=given.mapping,
        requests=frozenset(given.request_id),
        target=given.to,
        rate=given.rate,
        concurrency=given.concurrency,
        limit=given.limit,
        partial=given.partial,
        dry=given.dry_run,
        listing=given.list,
        as_json=given.json,
    )
    try:
        return OK if run(load(find_path(given.config)), options) else BAD_CONFIG
    except ConfigError:
        raise
    except PollerError as error:
        raise ConfigError([f"poller redrive: {error}"]) from None
