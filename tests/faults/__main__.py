"""`python -m tests.faults`: the campaign of faults and kills; `--seed K` replays one run."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.faults.campaign import Result, Totals, run_all, scenario


def main() -> int:
    """Exit 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="seeds to run")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this run alone; its folder is kept")
    parser.add_argument("--parallel", type=int, default=3 * (os.cpu_count() or 1) + 1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="write the totals there")
    options = parser.parse_args()
    is_replay = options.seed is not None
    seeds = [options.seed] if is_replay else range(options.first_seed, options.first_seed + options.runs)
    folder = tempfile.mkdtemp(prefix="poller-faults-")
    totals = Totals()
    for result in run_all(seeds, folder, options.parallel, keep=is_replay):
        totals.add(result)
        if is_replay or result.problems:
            _tell(result)
        elif sys.stderr.isatty():
            print(f"\r{totals.runs} of {len(seeds)} runs", end="", file=sys.stderr, flush=True)
    print(totals.table())
    if options.json:
        options.json.write_text(json.dumps(totals.document(), indent=1) + "\n")
    if totals.failed:
        print(f"failed: {' '.join(map(str, sorted(totals.failed)))}; what they left behind is in {folder}")
    return 1 if totals.failed else 0


def _tell(result: Result) -> None:
    print(f"seed {result.seed}: {scenario(result.seed).described()}")
    for problem in result.problems:
        print(f"    {problem}")
    print(f"    {'kept in' if result.folder else 'nothing kept'} {result.folder}")
    if result.problems:
        print(f"    to replay: python -m tests.faults --seed {result.seed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
