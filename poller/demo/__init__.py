"""`poller demo`: the real daemon on an embedded local AWS, with one failing record and one reshard to watch."""

import sys
from importlib.util import find_spec

_EXTRA = ("ministack", "rich")


def run(duration: float | None) -> int:
    """The exit code: 0 all delivered in order, 1 not so, 2 no extra installed. `duration` None: until Ctrl-C."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(
            f"poller demo: {' and '.join(missing)} not found: install the demo with: pip install 'esm-poller[demo]'",
            file=sys.stderr,
        )
        return 2
    from poller.demo.show import show

    return show(duration)
