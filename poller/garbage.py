"""Python's collector of cycles, for a process with many objects that live long and many that die at once."""

import gc

# New containers before the young are looked at, and how many of those looks before the older ones are, as by default.
# With Python's 700 a fifth of the CPU over a thousand idle shards went into looking at objects that were alive; what is
# garbage meanwhile takes a few megabytes.
_THRESHOLDS = (10_000, 10, 10)


def collect_rarely() -> None:
    """Leave what was imported alone for ever, and look at the rest less often. For the whole process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
