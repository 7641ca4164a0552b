"""A worker process; its parent starts it."""

import signal
import sys

if __name__ == "__main__":
    # The parent says when to stop. Some service managers signal every process of a service beside it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from poller.workers.child import work

    sys.exit(work(int(sys.argv[1])))
