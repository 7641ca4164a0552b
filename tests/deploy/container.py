"""Builds and runs images without a registry: podman and buildah, on a stand-in for the base image.

Needs root and Debian's buildah, podman, runc, netavark, aardvark-dns, iptables, catatonit and debootstrap. The stand-in
has what the Dockerfiles use of the official Python image: Debian bookworm, `python` in /usr/local/bin, pip, setuptools,
ensurepip and CA certificates. Its Python is Debian's.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
PYTHON = "python3.11"  # of Debian bookworm
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
_PLUGINS = Path("/usr/libexec/docker/cli-plugins")  # Debian's Compose 2 is there, beside the path
_CONTAINERS = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


def tool(name: str) -> str:
    """Where a tool is: beside the Python that runs the tests, among Docker's plugins, or in the path."""
    for place in (Path(sys.executable).parent, _PLUGINS):
        if (place / name).exists():
            return str(place / name)
    found = shutil.which(name)
    assert found, f"{name} is not installed; see .ci/run"
    return found


def run(*command: str, expect: int | None = 0, timeout: float = 300, **more: Any) -> "subprocess.CompletedProcess[str]":
    """A command that ended. It must exit as expected; None: anyhow."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, **more)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert expect in {None, done.returncode}, f"{' '.join(command)} exited {done.returncode}:\n{said}"
    return done


class Engine:
    """podman and buildah with everything of theirs in one folder, whose name is short: sockets are in it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="engine-", dir="/var/tmp"))
        files = {"CONTAINERS_CONF": _CONTAINERS, "CONTAINERS_STORAGE_CONF": _STORAGE}
        for name, text in files.items():
            (self.folder / name).write_text(text.format(folder=self.folder))
        self.environment = {name: str(self.folder / name) for name in files}
        self.environment["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

    def close(self) -> None:
        """Everything away: containers, networks with their rules, images."""
        self.podman("rm", "--all", "--force", "--time=0")
        self.podman("network", "prune", "--force")
        while run("umount", str(self.folder / "storage/overlay"), expect=None).returncode == 0:
            pass  # podman and its service each mount it on itself
        shutil.rmtree(self.folder)

    def podman(self, *arguments: str, **more: Any) -> str:
        """What it printed."""
        return run(tool("podman"), *arguments, env=self.environment, **more).stdout

    def build(self, dockerfile: str, context: str, tag: str) -> None:
        """The image that a Dockerfile makes, every step of it carried out. The base image is not asked for again."""
        ignored = TOP / f"{dockerfile}.dockerignore"
        run(
            tool("buildah"), "bud", "--isolation=chroot", "--format=docker", "--pull-never", "--layers=false",
            *([f"--ignorefile={ignored}"] if ignored.exists() else []),
            f"--file={TOP / dockerfile}", f"--tag={tag}", str(TOP / context),
            timeout=600, env=self.environment,
        )  # fmt: skip

    def inspect(self, *what: str) -> dict[str, Any]:
        [found] = json.loads(self.podman(*what))
        return found

    def make_base(self) -> None:
        """The stand-in, under the name of the base image."""
        root = self.folder / "base"
        included = f"{PYTHON},{PYTHON}-venv,python3-distutils,ca-certificates"
        run(tool("debootstrap"), "--variant=minbase", f"--include={included}", "bookworm", str(root), timeout=900)
        packages = root / f"usr/local/lib/{PYTHON}/dist-packages"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), "pip", "setuptools", "wheel")
        (root / f"usr/lib/{PYTHON}/EXTERNALLY-MANAGED").unlink()
        (root / "usr/local/bin/python").symlink_to(f"/usr/bin/{PYTHON}")
        # This machine's way to the package index.
        shutil.copyfile(f"/{_CERTIFICATES}", root / _CERTIFICATES)
        index = run(sys.executable, "-m", "pip", "config", "get", "global.index-url", expect=None).stdout.strip()
        (root / "etc/pip.conf").write_text(
            f"[global]\ncert = /{_CERTIFICATES}\n" + (f"index-url = {index}\n" if index else "")
        )
        archive = self.folder / "base.tar"
        with tarfile.open(archive, "w") as made:
            made.add(root, arcname=".")
        shutil.rmtree(root)
        path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.podman("import", "--change", path, str(archive), BASE)
        archive.unlink()
