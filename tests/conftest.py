"""Options of the whole suite."""

from functools import cache

import botocore.loaders
from hypothesis import HealthCheck, settings

# The same examples in every run, and no complaint about a slow machine: a test that fails, fails for a reason.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("repeatable")

# Most tests have sessions of their own; the descriptions of AWS's services, which never change, are parsed once.
botocore.loaders.create_loader = cache(botocore.loaders.create_loader)


def pytest_addoption(parser):
    parser.addoption(
        "--seeds", type=int, default=0, help="worlds of the simulation to run; 0: the default of each test"
    )
    parser.addoption("--first-seed", type=int, default=0, help="where the seeds begin")
    parser.addoption("--soak", action="store_true", help="run the long tests too")
    parser.addoption("--browser", action="store_true", help="run the tests that need Chromium too")
    parser.addoption("--deploy", action="store_true", help="run the tests that need the tools of tests/deploy too")


def pytest_collection_modifyitems(config, items):
    for marker in ("soak", "browser", "deploy"):
        if config.getoption(f"--{marker}"):
            continue
        deselected = [item for item in items if item.get_closest_marker(marker)]
        if deselected:
            config.hook.pytest_deselected(items=deselected)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
