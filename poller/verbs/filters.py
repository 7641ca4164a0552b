"""`filter test`."""

import argparse

from poller.verbs.common import FATAL, OK, Verbs, read_text

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


def add(verbs: Verbs) -> None:
    """Add it."""
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


def _filter_test(given: argparse.Namespace) -> int:
    from poller.filtertest import judge

    pattern = given.pattern
    if pattern.startswith("@"):
        pattern = read_text("PATTERN", pattern[1:])
    matched, lines = judge(pattern, read_text("EVENT", given.event))
    print("\n".join(lines))
    return OK if matched else FATAL
