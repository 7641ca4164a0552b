"""Kinesis, DynamoDB Streams and SQS as AWS runs them, for what no emulator does: see `server.FakeAws`."""

from tests.fakes.aws.server import FakeAws

__all__ = ["FakeAws"]
