"""Imports point one way (DESIGN.md, layers)."""

import ast
import re
import sys
from pathlib import Path

import poller

ROOT = Path(poller.__file__).parent
ADAPTERS = ("poller.sources", "poller.targets", "poller.destinations", "poller.stores")
BASE = {"poller.errors", "poller.ports", "poller.clock", "poller.settings"}


def imports() -> list[tuple[str, str]]:
    found = []
    for path in ROOT.rglob("*.py"):
        name = "poller." + str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [(name, node.module)] + [(name, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_core_imports_the_standard_library_only() -> None:
    """What decides never waits, reads no clock and knows no library but the JSON parser, for filters."""
    allowed = sys.stdlib_module_names - {"asyncio", "time", "random", "socket", "threading"} | {"msgspec"}
    for module, used in imports():
        if module.startswith("poller.core"):
            assert used.startswith("poller.core") or used.split(".")[0] in allowed, f"{module} imports {used}"


def test_the_runtime_imports_no_adapter() -> None:
    """`app` hands adapters in, so the simulation can hand in others."""
    for module, used in imports():
        if module.startswith("poller.runtime") and used.startswith("poller."):
            fine = used.startswith(("poller.core", "poller.runtime", *BASE))
            assert fine, f"{module} imports {used}"
            assert not used.startswith("poller.settings"), f"{module} imports {used}"


def test_adapters_know_neither_each_other_nor_the_runtime() -> None:
    """A new source or store touches its own folder."""
    for module, used in imports():
        family = next((a for a in ADAPTERS if module.startswith(a)), None)
        if family and used.startswith("poller."):
            fine = used.startswith(("poller.core", "poller.aws", family, *BASE)) or used == "poller.__version__"
            assert fine, f"{module} imports {used}"


def test_only_the_clock_reads_time_and_randomness() -> None:
    """Everything else is given them, so that it can be simulated."""
    for module, used in imports():
        if module.startswith(("poller.demo", "poller.verbs")) or module == "poller.clock":
            continue  # programs of their own beside the daemon
        assert used not in {"time", "secrets"}, f"{module} imports {used}"
        if used == "random":  # for its type only
            source = (ROOT / (module.removeprefix("poller.").replace(".", "/") + ".py")).read_text()
            assert not re.search(r"\brandom\.(?!Random\b)", source), f"{module} uses the global random"
