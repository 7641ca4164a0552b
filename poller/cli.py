"""The verbs of `poller`. Results go to standard output, logs and errors to standard error."""

import argparse
import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from poller import __version__
from poller.errors import ConfigError, PollerError

OK, FATAL, BAD_CONFIG = 0, 1, 2
_DEFAULT_URL = "http://127.0.0.1:9477"
# Verbs of the contract that this version does not have yet: shown in --help, refused with exit code 2.
_NOT_YET = {
    "checkpoints": "look at and move positions in the store: list, get, set, reset, export, import",
    "pause": "pause a mapping of a running daemon",
    "resume": "resume a paused mapping",
    "seek": "move a mapping of a running daemon to another position",
    "import": "print config mappings from an AWS account or a template",
    "redrive": "invoke again with what a failure destination holds",
}


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

    def add(name: str, text: str, verb: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(verb=verb)
        return made

    def add_config(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "-c",
            dest="config",
            metavar="FILE",
            help="config file (default: $POLLER_CONFIG, /etc/poller/poller.yaml, ./config/poller.yaml)",
        )

    run = add("run", "run the daemon until SIGTERM or SIGINT", _run)
    add_config(run)
    run.add_argument("--workers", type=_workers, default=1, metavar="N", help="processes (this version: 1)")
    validate = add("validate", "check the config file and print the resolved mappings", _validate)
    add_config(validate)
    validate.add_argument("--connect", action="store_true", help="also reach all that it names")
    demo = add("demo", "show the main job on an embedded local AWS (needs esm-poller[demo])", _demo)
    demo.add_argument("--duration", type=_seconds, metavar="N", help="end by itself after N seconds")
    status = add("status", "show the mappings and shards of a running daemon", _status)
    status.add_argument("--url", default=_DEFAULT_URL, help=f"of the daemon (default: {_DEFAULT_URL})")
    status.add_argument("--json", action="store_true", help="print what /api/status answers")
    _add_filter(verbs)
    add("schema", "print the JSON Schema of the config file, for editors", _schema)
    for name, text in _NOT_YET.items():
        made = add(name, f"{text} (not in this version yet)", _refuse)
        made.set_defaults(name=name)
        made.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


_FILTER_TEST = """\
Does this filter pattern match this event, and which leaf decided. Each deciding leaf is shown with its path, the value
that the event has there (or "absent") and the rule. Of a match these are all leaves that took part, else those that
prevented it.

PATTERN is the text of a pattern, or @FILE with it; FilterCriteria, {"Filters": [{"Pattern": "..."}]}, works too.
EVENT is a file, or - for standard input, with one of
  a Lambda event       {"Records": [...]}: each record is judged
  one of its records   opened as a mapping does it, by its eventSource: the body of aws:sqs and the data of aws:kinesis
                       are parsed, what is in kinesis is at the top level
  any other JSON       matched as it is
"""
_FILTER_EXITS = "Exit code: 0 a match (at least one record), 1 no match, 2 the pattern is bad or EVENT cannot be read."


def _add_filter(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "test a filter pattern against an event"
    made = verbs.add_parser("filter", help=text, description=text[0].upper() + text[1:] + ".")
    test = made.add_subparsers(metavar="VERB", required=True).add_parser(
        "test",
        help="does a pattern match an event, and which leaf decided",
        description=_FILTER_TEST,
        epilog=_FILTER_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    test.set_defaults(verb=_filter_test)
    test.add_argument("pattern", metavar="PATTERN", help="a pattern, or @FILE")
    test.add_argument("event", metavar="EVENT", help="a file, or - for standard input")


def _workers(text: str) -> int:
    if text != "1":
        raise argparse.ArgumentTypeError("more than one worker is not in this version yet; leave it out or give 1")
    return 1


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


def _run(given: argparse.Namespace) -> int:
    from poller.app import run
    from poller.config import find_path, load

    return run(load(find_path(given.config)))


def _validate(given: argparse.Namespace) -> int:
    from poller.config import find_path, load, resolved

    settings = load(find_path(given.config))
    print(resolved(settings))
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if given.connect:
        from poller.app import check_connections

        found = asyncio.run(check_connections(settings))
        if found:
            raise ConfigError(found)
        print("\nevery source, target, destination and the store can be reached")
    return OK


def _schema(_: argparse.Namespace) -> int:
    from poller.schema import config_schema

    print(json.dumps(config_schema(), indent=2))
    return OK


def _filter_test(given: argparse.Namespace) -> int:
    from poller.filtertest import judge

    pattern = given.pattern
    if pattern.startswith("@"):
        pattern = _read("PATTERN", pattern[1:])
    matched, lines = judge(pattern, _read("EVENT", given.event))
    print("\n".join(lines))
    return OK if matched else FATAL


def _read(what: str, path: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{what}: cannot read {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{what}: {path} is not UTF-8 text"]) from None


def _demo(given: argparse.Namespace) -> int:
    from poller.demo import run

    return run(given.duration)


def _status(given: argparse.Namespace) -> int:
    status = _ask(given.url.rstrip("/") + "/api/status")
    if given.json:
        print(json.dumps(status, indent=2))
        return OK
    for line in status_lines(status):
        print(line)
    return OK


def _ask(url: str) -> dict[str, Any]:
    """One GET of a running daemon. PollerError says what to check."""
    if not url.startswith(("http://", "https://")):
        raise PollerError(f"--url {url} is not a URL; give one such as {_DEFAULT_URL}")
    request = urllib.request.Request(url)  # noqa: S310 - checked above
    if token := os.environ.get("POLLER_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            document: dict[str, Any] = json.load(answer)
            return document
    except urllib.error.HTTPError as error:
        hint = "; set POLLER_TOKEN to a token of `server.auth`" if error.code in {401, 403} else ""
        raise PollerError(f"{url} answered {error.code} {error.reason}{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise PollerError(f"no daemon answers at {url}: {reason}; is `poller run` up, and on this port?") from None


def status_lines(status: dict[str, Any]) -> list[str]:
    """One line per mapping and per shard: state, lag, in flight, a queue's receive loops, last result."""
    lines = []
    for mapping in status["mappings"]:
        parts = [
            f"{mapping['uuid']}  {mapping['source']:<8} {mapping['function']}  {mapping['state']}",
            f"in flight {mapping['in_flight']}",
        ]
        if mapping.get("receivers") is not None:  # an older daemon does not say
            parts.append(f"receive loops {mapping['receivers']}/{mapping['receiver_limit']}")
        if mapping["breaker"] != "closed":
            parts.append(f"circuit {mapping['breaker']}: receiving is paused")
        if mapping["reason"]:
            parts.append(mapping["reason"])
        lines.append("  ".join(parts))
        lines.extend(_shard_line(shard) for shard in mapping["shards"])
    return lines or ["no mappings"]


def _shard_line(shard: dict[str, Any]) -> str:
    parts = [f"  {shard['id']}  {shard['state']}"]
    if shard["lag_seconds"] is not None:
        parts.append(f"lag {shard['lag_seconds']:.1f} s")
    if shard["blocked_seconds"]:
        parts.append(
            f"blocked for {shard['blocked_seconds']:.0f} s by {shard['first_sequence']}..{shard['last_sequence']}, "
            f"{shard['attempts']} attempts"
        )
    if shard["last_error"]:
        parts.append(shard["last_error"])
    return "  ".join(parts)


def _refuse(given: argparse.Namespace) -> int:
    print(f"poller {given.name}: not in this version of esm-poller yet", file=sys.stderr)
    return BAD_CONFIG
