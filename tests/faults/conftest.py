"""The fixtures of the integration tests."""

from tests.integration.conftest import account, daemons, fake_aws, ledger

__all__ = ["account", "daemons", "fake_aws", "ledger"]
