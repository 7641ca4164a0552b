"""`python -m tests.fuzz NAME [--minutes N]`: one target for long, guided by coverage where atheris is installed.

What fails an input is printed, and the input is kept in a file that `python -m tests.fuzz NAME FILE` runs again. Inputs
that reached new code are kept in --keep, a directory outside the repository, and are where the next run begins.
"""

import argparse
import importlib
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

MOST_BYTES = 8192  # of one input
_SLOW = 60  # seconds by the clock after which libFuzzer gives up on an input, for the kit's own bound comes first
_LIMIT_MIB = 2048


def main() -> int:
    """Run it. 0: nothing failed, 1: something did, 2: wrong arguments."""
    made = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    made.add_argument("name", metavar="NAME", help="a target, or `list`")
    made.add_argument("file", metavar="FILE", nargs="*", help="run these inputs only")
    made.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    made.add_argument("--keep", default="", help="directory for inputs that reach new code and for those that fail")
    given = made.parse_args()
    is_guided = find_spec("atheris") is not None and not given.file
    atheris: Any = importlib.import_module("atheris") if is_guided else None
    targets, kit = _load(atheris)
    target = targets.get(given.name)
    if target is None:
        print("\n".join(targets))
        return 0 if given.name == "list" else 2
    kit.quiet()
    for path in given.file:
        target(Path(path).read_bytes())
    if given.file:
        return 0
    keep = Path(given.keep or tempfile.mkdtemp(prefix=f"fuzz-{given.name}-"))
    keep.mkdir(parents=True, exist_ok=True)
    if atheris is None:
        print("atheris is not installed: going on without knowing which code an input reaches")
        return _unguided(target, given.minutes * 60, keep)
    for number, data in enumerate(target.inputs()):
        (keep / f"corpus-{number}").write_bytes(data)
    options = [
        f"-max_total_time={given.minutes * 60:.0f}",
        f"-max_len={MOST_BYTES}",
        f"-timeout={_SLOW}",
        f"-rss_limit_mb={_LIMIT_MIB}",
        f"-artifact_prefix={keep}/failed-",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(keep)], target, custom_mutator=_mutator(atheris, target))
    atheris.Fuzz()  # does not return
    return 0


def _load(atheris: Any) -> tuple[Any, Any]:
    """The targets and their kit; with atheris our own modules are instrumented, they alone."""
    if atheris is None:
        return importlib.import_module("tests.fuzz.targets").TARGETS, importlib.import_module("tests.fuzz.kit")
    for name in ("yaml", "aiohttp.web", "botocore.session", "botocore.parsers", "aiobotocore.session", "hypothesis"):
        importlib.import_module(name)  # before: they stay as they are, and fast
    with atheris.instrument_imports(include=["poller"]):
        return _load(None)


def _mutator(atheris: Any, target: Any) -> Any:
    """Half of the changes are libFuzzer's own, half those of `mutate`, which leave JSON what it is."""
    from tests.fuzz.mutate import changed

    others = target.inputs()

    def mutator(data: bytes, most: int, number: int) -> bytes:
        chance = Random(number)
        if chance.random() < 0.5:
            return atheris.Mutate(data, most)  # type: ignore[no-any-return]
        return data[:1] + changed(data[1:], others, chance)[: most - 1]

    return mutator


def _unguided(target: Any, seconds: float, keep: Path) -> int:
    """Without knowing which code an input reaches: documents near those of the corpus, each time others."""
    from tests.fuzz.mutate import near

    ending, count, chance = time.monotonic() + seconds, 0, Random()
    seeds = {at: target.seeds(kind) for at, kind in enumerate(target.kinds)}
    while time.monotonic() < ending:
        at = chance.choice(list(seeds))
        data, count = bytes([at]) + near(seeds[at], chance), count + 1
        try:
            target(data)
        except BaseException:
            path = keep / f"failed-{count}"
            path.write_bytes(data)
            print(f"failed: input {count}, kept: python -m tests.fuzz {target.name} {path}", file=sys.stderr)
            raise
    print(f"{count} inputs, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
