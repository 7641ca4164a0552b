"""Exit 0 when the daemon answers 200 at $POLLER_HEALTH_URL, else 1 with the reason. No proxy is asked.

A certificate is not verified: it is for the name that others use, and nothing secret is sent.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 5.0
_LONGEST_REASON = 1000  # bytes


def main() -> int:
    """The exit code; the reason, one line, goes to standard output, where `docker inspect` shows it."""
    url = os.environ.get("POLLER_HEALTH_URL", "http://127.0.0.1:9477/healthz")
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),  # noqa: S323, SLF001
    )
    try:
        with direct.open(url, timeout=TIMEOUT_SECONDS):
            return 0
    except urllib.error.HTTPError as error:
        print(f"{url} answered {error.code}: {error.read(_LONGEST_REASON).decode(errors='replace')}")
    except (OSError, ValueError) as error:
        print(f"{url} does not answer: {getattr(error, 'reason', error)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
