"""`python -m tests.benchmarks`: the daemon beside what it is compared with, row by row, and the goals of each.

Rounds are interleaved and medians shown. CPU per record inside one run is what to compare: wall rates depend on the
machine's other work. Nothing here asserts a time; a client that loses, repeats or reorders a record fails the run.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks import filters, scrape, table
from tests.benchmarks.records import RECORD_BYTES
from tests.benchmarks.rows import CASES, CLIENTS, ROWS, needed
from tests.benchmarks.run import Bench, BenchmarkError, Cpus, Figures, bench, choose_cpus, stalled

_PACKAGES = ("aiobotocore", "aiohttp", "boto3", "msgspec", "urllib3")


def _header(cpus: Cpus, options: argparse.Namespace) -> dict[str, Any]:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "python": platform.python_version(),
        "machine": models[0] if models else platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "record_bytes": RECORD_BYTES,
        "stub_cpu": cpus.stub,
        "client_cpu": cpus.client,
        "rounds": options.rounds,
        "quick": options.quick,
        "rows": options.rows,
    }


def _print_header(header: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    pinned = (
        f"stub pinned to CPU {header['stub_cpu']}, client to CPU {header['client_cpu']}"
        if header["client_cpu"] is not None
        else "stub and client share one CPU"
    )
    print(f"Python {header['python']}, {versions}, {header['machine']}")
    print(f"{header['record_bytes']}-byte records; {pinned}; medians of {header['rounds']} interleaved rounds")
    if header["quick"]:
        print("Quick: it shows that all works; the figures are not to be quoted")


def _measure(bench: Bench, name: str, clients: Sequence[str], rounds: int) -> dict[str, Any]:
    """Every client once a round; of each the median of every figure, and the rounds themselves."""
    case, began = CASES[name], time.monotonic()
    taken: dict[str, list[Figures]] = {client: [] for client in clients}
    for _ in range(rounds):
        for client in clients:
            taken[client].append(case.measure(bench, client))
    answer = {}
    for client, each in taken.items():
        median = {key: statistics.median(one[key] for one in each) for key in each[0]}
        answer[client] = {"median": median, "rounds": each}
        shown = ", ".join(f"{key} {value:{',.0f' if value >= 100 else '.4g'}}" for key, value in median.items())
        print(f"{name}, {client}: {shown}")
    print(f"{name} took {time.monotonic() - began:.0f} s", flush=True)
    return answer


def _stalled(bench: Bench, seconds: float) -> Figures:
    shards, timeout = 1_000, 5.0
    figures = stalled(bench, shards, seconds, timeout)
    print(
        f"\n{shards} full shards, a target that never answers, timeout {timeout:.0f} s, {figures['tries']:.0f} tries: "
        f"{figures['rss_mb_early']:.0f} MB after a fifth, {figures['rss_mb_end']:.0f} MB in the end, at most "
        f"{figures['rss_mb_most']:.0f}; descriptors {figures['descriptors_early']:.0f}, "
        f"{figures['descriptors_end']:.0f}, at most {figures['descriptors_most']:.0f}"
    )
    return figures


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rows", metavar="LIST", help=f"of {ROWS[0]} to {ROWS[-1]}, with commas; all of them")
    parser.add_argument("--rounds", type=int, metavar="N", help="3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the records: shows that it works, no more")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every round")
    parser.add_argument("--clients", metavar="LIST", default=",".join(CLIENTS), help=f"of {','.join(CLIENTS)}")
    parser.add_argument(
        "--stalled", type=float, nargs="?", const=600.0, metavar="SECONDS", help="memory while the target hangs instead"
    )
    parser.add_argument("--filters", action="store_true", help="what five filters cost by themselves instead")
    parser.add_argument("--scrape", action="store_true", help="what a scrape of the metrics costs instead")
    options = parser.parse_args(arguments)
    options.clients = options.clients.split(",")
    if unknown := set(options.clients) - set(CLIENTS):
        parser.error(f"--clients: no such client: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    given = options.rows.split(",") if options.rows else [str(row) for row in ROWS]
    if unknown := set(given) - {str(row) for row in ROWS}:
        parser.error(f"--rows: no such row: {', '.join(sorted(unknown))}; there are {ROWS[0]} to {ROWS[-1]}")
    options.rows = sorted(int(row) for row in given)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 when anything could not be measured."""
    options = _options(arguments)
    if options.json:  # now, and not after a quarter of an hour
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).touch()
    cpus = choose_cpus()
    result: dict[str, Any] = {"run": _header(cpus, options)}
    _print_header(result["run"])
    errors = []
    try:
        if options.filters:
            result["filters"] = filters.measure(options.rounds)
        if options.scrape:
            result["scrape"] = scrape.measure(options.rounds)
        if options.stalled:
            with bench(cpus) as stub:
                result["stalled"] = _stalled(stub, 30.0 if options.quick else options.stalled)
        if len(result) == 1:
            result["cases"] = {}
            for name, clients in needed(options.rows, options.clients).items():
                try:
                    with bench(cpus, is_quick=options.quick) as stub:
                        result["cases"][name] = _measure(stub, name, clients, options.rounds)
                except BenchmarkError as error:
                    result["cases"][name] = {}
                    errors.append(f"{name}: {error}")
                    print(errors[-1], file=sys.stderr, flush=True)
            rows = table.lines(result["cases"], options.rows)
            result["table"] = [{**asdict(line), "met": line.met} for line in rows]
            print(f"\n{table.plain(rows)}")
    except BenchmarkError as error:
        errors.append(str(error))
        print(f"\n{error}", file=sys.stderr)
    if options.json:
        result["errors"] = errors
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    if errors:
        print(f"{len(errors)} could not be measured", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
