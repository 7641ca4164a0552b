"""What is measured, row by row, and the goals: `CASES` and `GOALS`.

A case is one interleaved comparison of clients, or of variants of the daemon. A goal is a line of the table.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from tests.benchmarks import run
from tests.benchmarks.filters import stream_filters
from tests.benchmarks.records import KEYS
from tests.benchmarks.run import Bench, Figures, Scenario

CLIENTS = ("daemon", "plain", "boto3", "bare")


@dataclass(frozen=True, slots=True)
class Case:
    """`clients`: in the order of a round; names of `CLIENTS`, or of variants of the daemon."""

    clients: tuple[str, ...]
    measure: Callable[[Bench, str], Figures]


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table: a figure of a case.

    With a `peer`, the goal is about their ratio: `at_least`, how many times better than the peer; `at_most`, how many
    times the peer's cost. Without one `at_most` is about the figure itself, with `spread` about the ratio of the dearest
    of the case's clients to the cheapest. A line without a goal is there to be read.
    """

    row: int
    measure: str
    case: str
    figure: str
    form: str = ".1f"
    client: str = "daemon"
    peer: str = ""
    at_least: float | None = None
    at_most: float | None = None
    spread: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The clients of the case that it is about, in its order; the peer after the daemon."""
        if self.spread:
            return CASES[self.case].clients
        return (self.client, self.peer) if self.peer else (self.client,)


def _compared(scenario: Scenario, records: Mapping[str, int]) -> Case:
    """The same work for several clients; slow ones get less of it."""
    return Case(
        tuple(records),
        lambda bench, client: run.throughput(bench, client, replace(scenario, records=records[client])),
    )


def _variants(scenarios: Mapping[str, Scenario]) -> Case:
    """Several scenarios for the daemon."""
    return Case(tuple(scenarios), lambda bench, name: run.throughput(bench, "daemon", scenarios[name]))


_QUEUE = Scenario("sqs", 10, 0, warm=10)
_KINESIS_100 = Scenario("kinesis", 100, 0, shards=10)
_KINESIS_1000 = Scenario("kinesis", 1_000, 0, shards=10)
_DYNAMODB = Scenario("dynamodb", 100, 0, shards=10)
_GROWTH = Scenario("kinesis", 100, 200_000, warm=1)
# Reads of as many records as there are keys, which ten lanes share evenly: with ParallelizationFactor every batch is as
# full as without.
_FEATURES = replace(_KINESIS_100, records=200_000, warm=KEYS // 100, page=KEYS)
_FULL_RATE = Scenario("kinesis", 1_000, 600_000, shards=100, warm=1)

CASES: dict[str, Case] = {
    "sqs 10": _compared(_QUEUE, {"daemon": 40_000, "plain": 15_000, "boto3": 15_000, "bare": 50_000}),
    "kinesis 100": _compared(_KINESIS_100, {"daemon": 300_000, "plain": 60_000, "bare": 300_000}),
    "kinesis 1000": _compared(_KINESIS_1000, {"daemon": 600_000, "plain": 60_000, "bare": 600_000}),
    "dynamodb 100": _compared(_DYNAMODB, {"daemon": 200_000, "plain": 20_000, "bare": 300_000}),
    "idle shards": Case(
        ("daemon", "plain"), lambda bench, client: run.idle(bench, client, 1_000, 3 if bench.is_quick else 8)
    ),
    # A long poll takes 20 s; loops that began together poll together.
    "idle queues": Case(("daemon",), lambda bench, _: run.idle_queues(bench, 100, 5 if bench.is_quick else 20)),
    # All records of the stub arrived at one moment, so they are of one tumbling window: no window ends while they are
    # delivered, unless the clock passes its end meanwhile, and then one does in each shard.
    "features": _variants(
        {
            "off": _FEATURES,
            "ParallelizationFactor": replace(_FEATURES, mapping={"ParallelizationFactor": 10}),
            "filters": replace(_FEATURES, mapping={"FilterCriteria": {"Filters": stream_filters()}}),
            "ReportBatchItemFailures": replace(
                _FEATURES,
                mapping={"FunctionResponseTypes": ["ReportBatchItemFailures"]},
                answer='{"batchItemFailures": []}',
            ),
            "tumbling windows": replace(
                _FEATURES, mapping={"TumblingWindowInSeconds": 60}, answer='{"state": {"count": 4711, "total": 1.5}}'
            ),
        }
    ),
    "memory": Case(("daemon",), lambda bench, _: run.memory(bench, 1_000, 2_000 if bench.is_quick else 10_000)),
    "full rate": _variants({"daemon": _FULL_RATE}),
    "latency sqs": Case(("daemon",), lambda bench, _: run.added_latency(bench, "sqs", 2 if bench.is_quick else 5)),
    "latency kinesis": Case(
        ("daemon",), lambda bench, _: run.added_latency(bench, "kinesis", 2 if bench.is_quick else 5)
    ),
    "tls sqs 10": _compared(replace(_QUEUE, tls=True), {"daemon": 25_000, "plain": 10_000}),
    "tls kinesis 1000": _compared(replace(_KINESIS_1000, tls=True), {"daemon": 400_000, "plain": 60_000}),
    "growth shards": _variants({f"{shards}": replace(_GROWTH, shards=shards) for shards in (1, 10, 100, 1_000)}),
    # 100 shards in all: only the number of mappings changes.
    "growth mappings": _variants(
        {f"{streams}": replace(_GROWTH, streams=streams, shards=100 // streams) for streams in (1, 10, 100)}
    ),
    "start-up": Case(("daemon",), lambda bench, _: run.startup(bench, 1_000, latency_ms=10)),
}

GOALS: tuple[Goal, ...] = (
    Goal(1, "SQS, BatchSize 10, us a message", "sqs 10", "us_per_record", peer="plain", at_least=4),
    Goal(1, "SQS beside boto3, 4 threads", "sqs 10", "us_per_record", peer="boto3", at_least=6),
    Goal(2, "SQS beside a bare aiohttp loop", "sqs 10", "us_per_record", peer="bare", at_most=1.7),
    Goal(3, "Kinesis, BatchSize 100, us a record", "kinesis 100", "us_per_record", ".2f", peer="plain", at_least=5),
    Goal(3, "Kinesis, BatchSize 1,000, us a record", "kinesis 1000", "us_per_record", ".2f", peer="plain", at_least=8),
    Goal(3, "Kinesis 100, MB a CPU-second", "kinesis 100", "mb_per_cpu_second", ".0f"),
    Goal(3, "Kinesis 1,000, MB a CPU-second", "kinesis 1000", "mb_per_cpu_second", ".0f"),
    Goal(3, "Kinesis 100 beside the bare loop", "kinesis 100", "us_per_record", ".2f", peer="bare"),
    Goal(3, "Kinesis 1,000 beside the bare loop", "kinesis 1000", "us_per_record", ".2f", peer="bare"),
    Goal(4, "DynamoDB Streams, us a record", "dynamodb 100", "us_per_record", ".2f", peer="plain", at_least=8),
    Goal(4, "DynamoDB Streams beside the bare loop", "dynamodb 100", "us_per_record", ".2f", peer="bare"),
    Goal(5, "1,000 idle shards, us a poll", "idle shards", "us_per_poll", ".0f", peer="plain", at_most=0.25),
    Goal(6, "100 idle queues, of a core", "idle queues", "client_busy", ".2%", at_most=0.01),
    *(
        Goal(7, f"{name}, us a record", "features", "us_per_record", ".2f", client=name, peer="off", at_most=at_most)
        for name, at_most in (
            ("ParallelizationFactor", 1.3),
            ("filters", 1.6),
            ("ReportBatchItemFailures", 1.3),
            ("tumbling windows", 1.3),
        )
    ),
    Goal(8, "1,000 idle shards, MB in all", "memory", "rss_mb", ".0f", at_most=90),
    Goal(8, "each further shard to 10,000, KB", "memory", "kb_per_shard", at_most=20),
    Goal(8, "100 shards at full rate, MB at most", "full rate", "rss_mb_most", ".0f", at_most=200),
    Goal(9, "added latency, SQS, p99 ms", "latency sqs", "p99_ms", ".2f", at_most=5),
    Goal(9, "added latency, Kinesis, p99 ms", "latency kinesis", "p99_ms", ".2f", at_most=5),
    Goal(10, "TLS: SQS, us a message", "tls sqs 10", "us_per_record", peer="plain", at_least=4),
    Goal(
        10,
        "TLS: GetRecords of 1,000, us a record",
        "tls kinesis 1000",
        "us_per_record",
        ".2f",
        peer="plain",
        at_least=8,
    ),
    Goal(11, "1 to 1,000 shards, us a record", "growth shards", "us_per_record", ".2f", at_most=1.5, spread=True),
    Goal(11, "1 to 100 mappings, us a record", "growth mappings", "us_per_record", ".2f", at_most=1.5, spread=True),
    Goal(11, "start-up of 1,000 shards, s", "start-up", "seconds", at_most=10),
)

ROWS = tuple(sorted({goal.row for goal in GOALS}))


def needed(rows: Collection[int], clients: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Of each case that these rows need the clients; of the real ones only those that are asked for."""
    answer = {}
    for name, case in CASES.items():
        wanted = {client for goal in GOALS if goal.case == name and goal.row in rows for client in goal.needs}
        chosen = tuple(one for one in case.clients if one in wanted and (one in clients or one not in CLIENTS))
        if chosen:
            answer[name] = chosen
    return answer
