"""`run`, `validate`, `schema`, `demo`."""

import argparse
import asyncio
import json
import sys
from typing import TYPE_CHECKING

from poller.errors import ConfigError
from poller.verbs.common import OK, Verbs, add_config, add_verb, seconds

if TYPE_CHECKING:
    from poller.settings import Settings

_MOST_WORKERS = 64


def add(verbs: Verbs) -> None:
    """Add them."""
    run = add_verb(verbs, "run", "run the daemon until SIGTERM or SIGINT", _run)
    add_config(run)
    run.add_argument(
        "--workers", type=_workers, default=1, metavar="N", help="processes to share the work (default: 1)"
    )
    validate = add_verb(verbs, "validate", "check the config file and print the resolved mappings", _validate)
    add_config(validate)
    validate.add_argument("--connect", action="store_true", help="also reach all that it names")
    demo = add_verb(verbs, "demo", "show the main job on an embedded local AWS (needs esm-poller[demo])", _demo)
    demo.add_argument("--duration", type=seconds, metavar="N", help="end by itself after N seconds")
    add_verb(verbs, "schema", "print the JSON Schema of the config file, for editors", _schema)


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {_MOST_WORKERS}")
    return int(text)


def _run(given: argparse.Namespace) -> int:
    from poller.config import find_path, load

    settings = load(find_path(given.config))
    _check_certificate(settings)
    if given.workers > 1:
        from poller.workers.parent import run as run_workers

        return run_workers(settings, given.workers)
    from poller.app import run

    return run(settings)


def _check_certificate(settings: "Settings") -> None:
    """ConfigError. Not a part of `load`: verbs that serve nothing need not be able to read the key."""
    from poller.server.certificate import load

    if settings.server.tls is not None:
        load(settings.server.tls)


def _validate(given: argparse.Namespace) -> int:
    from poller.config import find_path, load, resolved
    from poller.filemodes import loose_modes

    settings = load(find_path(given.config))
    _check_certificate(settings)
    print(resolved(settings))
    for warning in (*settings.warnings, *loose_modes(settings)):
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


def _demo(given: argparse.Namespace) -> int:
    from poller.demo import run

    return run(given.duration)
