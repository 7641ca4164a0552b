"""`python -m tests.benchmarks`: the daemon beside a plain aiobotocore loop and a bare aiohttp loop, in one run.

Rounds are interleaved and medians shown. CPU per record inside one run is what to compare: wall rates depend on the
machine's other work. Nothing here asserts a time; a client that loses, repeats or reorders a record fails the run.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import filters, scrape
from tests.benchmarks.run import (
    BenchmarkError,
    Cpus,
    Scenario,
    StubProcess,
    choose_cpus,
    idle,
    idle_queues,
    latency,
    stalled,
    stub_process,
    throughput,
)
from tests.benchmarks.stub import RECORD_BYTES

CLIENTS = ("daemon", "plain", "bare")
SCENARIOS = (
    Scenario("kinesis", 10, 100, {"daemon": 400_000, "plain": 60_000, "bare": 300_000}),
    Scenario("kinesis", 10, 1_000, {"daemon": 600_000, "plain": 60_000, "bare": 800_000}),
    Scenario("dynamodb", 10, 100, {"daemon": 200_000, "plain": 40_000, "bare": 300_000}),
    Scenario("sqs", 1, 10, {"daemon": 60_000, "plain": 20_000, "bare": 80_000}),
)
QUICK_SHARE = 0.05

Figures = dict[str, float]


def _rounds(
    clients: Sequence[str], rounds: int, measure: Callable[[str], Figures]
) -> dict[str, tuple[Figures, list[Figures]]]:
    """Every client once a round; for each, the median of each figure and the rounds themselves."""
    taken: dict[str, list[Figures]] = {client: [] for client in clients}
    for _ in range(rounds):
        for client in clients:
            taken[client].append(measure(client))
    return {
        client: ({key: statistics.median(one[key] for one in ones) for key in ones[0]}, ones)
        for client, ones in taken.items()
    }


def _ratio(rows: dict[str, tuple[Figures, list[Figures]]], one: str, other: str, key: str) -> float | None:
    """How many times dearer `one` is than `other`."""
    return rows[one][0][key] / rows[other][0][key] if one in rows and other in rows else None


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _header(cpus: Cpus, rounds: int) -> dict[str, Any]:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "python": platform.python_version(),
        "machine": models[0] if models else platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("aiobotocore", "aiohttp", "msgspec")},
        "record_bytes": RECORD_BYTES,
        "tls": False,
        "stub_cpu": cpus.stub,
        "client_cpu": cpus.client,
        "rounds": rounds,
    }


def _print_header(header: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    pinned = (
        f"stub pinned to CPU {header['stub_cpu']}, client to CPU {header['client_cpu']}"
        if header["client_cpu"] is not None
        else "stub and client share one CPU"
    )
    print(f"Python {header['python']}, {versions}, {header['machine']}")
    print(f"{header['record_bytes']}-byte records, no TLS; {pinned}; medians of {header['rounds']} interleaved rounds")


def _throughput(
    clients: Sequence[str], options: argparse.Namespace, stub: StubProcess, cpus: Cpus
) -> list[dict[str, Any]]:
    print(
        f"\n{'source batch':<14}{'client':<8}{'records/CPU-s':>14}{'us/record':>11}{'x plain':>9}{'% of bare':>11}"
        f"{'client %':>10}{'stub %':>8}{'RSS MB':>8}  us/record of each round"
    )
    answer = []
    for scenario in SCENARIOS:
        share = QUICK_SHARE if options.quick else 1.0
        rows = _rounds(clients, options.rounds, lambda client: throughput(client, scenario, share, stub, cpus))  # noqa: B023
        for client, (median, each) in rows.items():
            plain = _ratio(rows, "plain", client, "us_per_record")
            bare = _ratio(rows, "bare", client, "us_per_record")
            print(
                f"{scenario.name:<14}{client:<8}{median['records_per_cpu_second']:>14,.0f}{median['us_per_record']:>11.2f}"
                f"{_show(plain, '.2f'):>9}{_show(bare and bare * 100, '.0f'):>11}{median['client_busy'] * 100:>10.0f}"
                f"{median['stub_busy'] * 100:>8.0f}{median['rss_mb']:>8.0f}  "
                + " ".join(f"{one['us_per_record']:.2f}" for one in each),
                flush=True,
            )
            answer.append(
                {
                    "source": scenario.source,
                    "shards": scenario.shards,
                    "batch_size": scenario.batch,
                    "client": client,
                    "times_better_than_plain": plain,
                    "share_of_bare": bare,
                    "median": median,
                    "rounds": each,
                }
            )
    return answer


def _idle(clients: Sequence[str], options: argparse.Namespace, stub: StubProcess, cpus: Cpus) -> list[dict[str, Any]]:
    seconds = 3.0 if options.quick else 15.0
    print(f"\n{options.idle} idle Kinesis shards, {seconds:.0f} s")
    print(f"{'client':<8}{'us/poll':>9}{'% of plain':>12}{'polls/s':>9}{'client %':>10}{'RSS MB':>8}")
    rows = _rounds(clients, options.rounds, lambda client: idle(client, options.idle, seconds, stub, cpus))
    answer = []
    for client, (median, each) in rows.items():
        share = _ratio(rows, client, "plain", "us_per_poll")
        print(
            f"{client:<8}{median['us_per_poll']:>9.0f}{_show(share and share * 100, '.0f'):>12}"
            f"{median['polls_per_second']:>9.0f}{median['client_busy'] * 100:>10.1f}{median['rss_mb']:>8.0f}",
            flush=True,
        )
        answer.append(
            {"client": client, "shards": options.idle, "share_of_plain": share, "median": median, "rounds": each}
        )
    return answer


def _idle_queues(options: argparse.Namespace, stub: StubProcess, cpus: Cpus) -> Figures:
    figures = idle_queues(options.idle_queues, 5.0 if options.quick else 60.0, stub, cpus)
    print(
        f"\n{options.idle_queues} idle queues: {figures['client_busy']:.2%} of a core, {figures['polls_per_minute']:.0f} "
        f"polls a minute, {figures['rss_mb']:.0f} MB, {figures['descriptors']:.0f} descriptors"
    )
    return figures


def _stalled(options: argparse.Namespace, stub: StubProcess, cpus: Cpus) -> Figures:
    shards, timeout = 1_000, 5.0
    figures = stalled(shards, 30.0 if options.quick else options.stalled, timeout, stub, cpus)
    print(
        f"\n{shards} full shards, a target that never answers, timeout {timeout:.0f} s, {figures['tries']:.0f} tries: "
        f"{figures['rss_mb_early']:.0f} MB after a fifth, {figures['rss_mb_end']:.0f} MB in the end, at most "
        f"{figures['rss_mb_most']:.0f}; descriptors {figures['descriptors_early']:.0f}, "
        f"{figures['descriptors_end']:.0f}, at most {figures['descriptors_most']:.0f}"
    )
    return figures


def _latency(
    clients: Sequence[str], options: argparse.Namespace, stub: StubProcess, cpus: Cpus
) -> list[dict[str, Any]]:
    messages = 100 if options.quick else 1_000
    print(f"\nSQS, one message each 10 ms, {messages} messages: milliseconds from queue to target")
    print(f"{'client':<8}{'p50':>9}{'p99':>9}{'max':>9}")
    rows = _rounds(clients, options.rounds, lambda client: latency(client, messages, stub, cpus))
    for client, (median, _) in rows.items():
        print(f"{client:<8}{median['p50_ms']:>9.2f}{median['p99_ms']:>9.2f}{median['max_ms']:>9.2f}", flush=True)
    return [{"client": client, "median": median, "rounds": each} for client, (median, each) in rows.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, metavar="N", help="3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the records: shows that it works, no more")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every round")
    parser.add_argument("--clients", metavar="LIST", default=",".join(CLIENTS), help="of daemon,plain,bare")
    parser.add_argument(
        "--idle", type=int, nargs="?", const=1_000, metavar="SHARDS", help="idle cost and memory instead"
    )
    parser.add_argument("--idle-queues", type=int, nargs="?", const=100, metavar="QUEUES", help="the same of queues")
    parser.add_argument(
        "--stalled", type=float, nargs="?", const=600.0, metavar="SECONDS", help="memory while the target hangs instead"
    )
    parser.add_argument("--latency", action="store_true", help="queue to target instead")
    parser.add_argument("--filters", action="store_true", help="what five filters cost instead")
    parser.add_argument("--scrape", action="store_true", help="what a scrape of the metrics costs instead")
    options = parser.parse_args(arguments)
    clients = options.clients.split(",")
    if unknown := set(clients) - set(CLIENTS):
        parser.error(f"--clients: no such client: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    parsed = [client for client in clients if client != "bare"]  # a loop that parses nothing cannot rest or be followed

    cpus = choose_cpus()
    result: dict[str, Any] = {"run": _header(cpus, options.rounds)}
    _print_header(result["run"])
    try:
        with stub_process(cpus) as stub:
            if options.idle:
                result["idle"] = _idle(parsed, options, stub, cpus)
            if options.idle_queues:
                result["idle_queues"] = _idle_queues(options, stub, cpus)
            if options.stalled:
                result["stalled"] = _stalled(options, stub, cpus)
            if options.latency:
                result["latency"] = _latency(parsed, options, stub, cpus)
            if options.filters:
                result["filters"] = filters.measure(options.rounds)
            if options.scrape:
                result["scrape"] = scrape.measure(options.rounds)
            if len(result) == 1:
                result["throughput"] = _throughput(clients, options, stub, cpus)
    except BenchmarkError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
