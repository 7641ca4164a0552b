"""Options of the whole suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--seeds", type=int, default=0, help="worlds of the simulation to run; 0: the default of each test"
    )
    parser.addoption("--first-seed", type=int, default=0, help="where the seeds begin")
    parser.addoption("--soak", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        deselected = [item for item in items if item.get_closest_marker("soak")]
        if deselected:
            config.hook.pytest_deselected(items=deselected)
            items[:] = [item for item in items if not item.get_closest_marker("soak")]
