"""The daemon's HTTP server: metrics, health, the Lambda mapping API, the status page."""

from poller.server.app import Server

__all__ = ["Server"]
