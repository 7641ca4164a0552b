"""The fixtures of the integration tests; every test here is marked."""

import pytest

from tests.integration.conftest import account, daemons, fake_aws, ledger, ministack, roto

__all__ = ["account", "daemons", "fake_aws", "ledger", "ministack", "roto"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/deploy/" in str(item.path):
            item.add_marker(pytest.mark.deploy)
