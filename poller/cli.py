"""The command `poller`. Results go to standard output, logs and errors to standard error."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from poller import __version__
from poller.errors import ConfigError, PollerError
from poller.verbs import checkpoints, control, daemon, filters, importing, redrive, status
from poller.verbs.common import BAD_CONFIG, FATAL


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; answers its exit code. A user's mistake is a few clear lines, never a traceback."""
    parser = _parser()
    given = parser.parse_args(arguments)
    verb: Callable[[argparse.Namespace], int] = given.verb
    try:
        return verb(given)
    except ConfigError as error:
        print("\n".join(error.mistakes), file=sys.stderr)
        return BAD_CONFIG
    except PollerError as error:
        print(f"poller: {error}", file=sys.stderr)
        return FATAL
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads our output any more
        return FATAL


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="poller",
        description="AWS Lambda event source mappings for HTTP and Lambda targets: Kinesis, DynamoDB Streams, SQS.",
    )
    parser.add_argument("--version", action="version", version=f"esm-poller {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for family in (daemon, status, control, checkpoints, importing, filters, redrive):
        family.add(verbs)
    return parser
