"""The lock files of the images against pyproject.toml. When one of these fails: run deploy/lock."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DAEMON, BUILD = "deploy/requirements.lock", "deploy/container/build.lock"
LOCAL_AWS = "deploy/container/aws/ministack.lock"
PYTHONS = ("3.11", "3.12", "3.13")


def locked(path: str) -> dict[str, tuple[str, Marker | None, list[str]]]:
    """By name: version, marker, hashes."""
    found = {}
    for entry in re.sub(r" *#.*", "", (TOP / path).read_text()).replace("\\\n", " ").splitlines():
        if not entry.strip():
            continue
        [requirement, *hashes] = entry.split(" --hash=")
        parsed = Requirement(requirement)
        [exact] = parsed.specifier
        assert exact.operator == "==", entry
        assert parsed.name not in found, f"{parsed.name} is locked twice"
        found[parsed.name] = (exact.version, parsed.marker, [text.strip() for text in hashes])
    return found


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (DAEMON, PROJECT["project"]["dependencies"] + EXTRAS["tracing"]),
        (BUILD, PROJECT["build-system"]["requires"]),
        (LOCAL_AWS, [text for text in EXTRAS["demo"] if text.startswith("ministack")]),
    ],
)
def test_a_lock_has_what_the_project_asks_for(path, wanted):
    """Each requirement of pyproject.toml is locked to a version that it allows, on every Python that we support."""
    lock = locked(path)
    for text in wanted:
        requirement = Requirement(text)
        version, marker, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{text}, but {version} is locked"
        for python in PYTHONS:
            environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
            assert marker is None or marker.evaluate(environment), f"{text} is not locked for Python {python}"


@pytest.mark.parametrize("path", [DAEMON, BUILD, LOCAL_AWS])
def test_every_locked_package_has_hashes(path):
    """Nothing is installed that is not, byte for byte, what was locked."""
    for name, (_, _, hashes) in locked(path).items():
        assert hashes, name
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", text) for text in hashes), name


def test_the_image_has_the_aiobotocore_that_the_tests_run_with():
    """The hot calls lean on botocore's inside: what is shipped is what was tested."""
    [tested] = [Requirement(text) for text in EXTRAS["demo"] if text.startswith("aiobotocore")]
    version, _, _ = locked(DAEMON)["aiobotocore"]
    assert str(tested.specifier) == f"=={version}"


def test_the_image_says_its_version():
    """The label of the image is the version of the package."""
    dockerfile = (TOP / "deploy/container/Dockerfile").read_text()
    assert f"\nARG VERSION={PROJECT['project']['version']}\n" in dockerfile
