"""Self-hosted AWS Lambda event source mappings for HTTP and Lambda targets."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("esm-poller")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
