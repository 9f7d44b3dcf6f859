"""A Docker engine for the tests: that of DOCKER_HOST, or one started here with a folder and a socket of its own."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker" / "compose.yaml"
_LEAST_COMPOSE = (2, 24)


def missing(reason: str) -> None:
    """Skips on a laptop, fails in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Engine:
    """Runs the command line of Docker against one engine."""

    program: str
    env: Mapping[str, str]

    def run(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
        """What it printed.

        Raises:
            AssertionError: it failed, with what it said.
        """
        done = subprocess.run(
            [self.program, *arguments], env={**self.env, **(env or {})}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"docker {' '.join(map(str, arguments))}: {done.stderr[-4000:]}"
        return done.stdout

    def inspect(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(self.run("inspect", container))
        assert isinstance(found, dict)
        return found

    def had(self, image: str) -> bool:
        """Whether the image is there or can be pulled."""
        for command in (("image", "inspect", image), ("pull", "--quiet", image)):
            if not subprocess.run([self.program, *command], env=self.env, capture_output=True, check=False).returncode:
                return True
        return False


@contextmanager
def running(folder: Path) -> Iterator[Engine]:
    env = dict(os.environ) | {"DOCKER_CONFIG": str(folder / "config"), "DOCKER_BUILDKIT": "1"}
    (folder / "config").mkdir(parents=True)
    if "DOCKER_HOST" in env:
        yield _with_compose(Engine(_program(), env), folder)
        return
    daemon = shutil.which("dockerd")
    if daemon is None or os.geteuid():
        missing("no Docker engine: set DOCKER_HOST, or be root and apt-get install docker.io")
    env["DOCKER_HOST"] = f"unix://{folder}/docker.sock"
    where = ("--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "docker.pid")
    command = (daemon, *where, "--host", env["DOCKER_HOST"])
    with (folder / "dockerd.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            engine = Engine(_program(), env)
            eventually(lambda: _answers(engine), within_s=60)
            yield _with_compose(engine, folder)
        finally:
            process.terminate()


def _program() -> str:
    """Debian's own command line, where it is, brings BuildKit; another may need a plug-in for it."""
    found = shutil.which("docker", path=f"/usr/bin:{os.environ['PATH']}")
    if found is None:
        missing("no docker on PATH: apt-get install docker.io")
    return str(found)


def _answers(engine: Engine) -> bool:
    return not subprocess.run([engine.program, "info"], env=engine.env, capture_output=True, check=False).returncode


def _with_compose(engine: Engine, folder: Path) -> Engine:
    """The engine with a Compose that is new enough, on Debian 12 as root that of Debian 13."""
    plugins = Path(engine.env["DOCKER_CONFIG"]) / "cli-plugins"
    installed = Path.home() / ".docker" / "cli-plugins" / "docker-compose"
    if installed.exists():
        plugins.mkdir()
        (plugins / "docker-compose").symlink_to(installed)
    if _compose_version(engine) < _LEAST_COMPOSE:
        if os.geteuid() or not shutil.which("apt-get"):
            missing("no Docker Compose 2.24 or newer: install docker-compose of Debian 13, or docker-compose-v2")
        plugins.mkdir(exist_ok=True)
        unpacked = _from_debian_13("docker-compose", folder)
        shutil.copy(unpacked / "usr/libexec/docker/cli-plugins/docker-compose", plugins)
    return engine


def _compose_version(engine: Engine) -> tuple[int, ...]:
    command = [engine.program, "compose", "version", "--short"]
    said = subprocess.run(command, env=engine.env, capture_output=True, text=True, check=False)
    found = re.match(r"v?(\d+)\.(\d+)", said.stdout) if not said.returncode else None
    return tuple(map(int, found.groups())) if found else (0,)


def _from_debian_13(package: str, folder: Path) -> Path:
    """The package unpacked, not installed."""
    (folder / "apt" / "lists" / "partial").mkdir(parents=True)
    (folder / "sources.list").write_text(f"deb {debian_mirror()} trixie main\n")
    told = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": folder / "apt" / "lists",
        "Dir::Cache": folder / "apt",
        "APT::Sandbox::User": "root",
    }
    options = [f"-o{name}={value}" for name, value in told.items()]
    subprocess.run(["apt-get", *options, "update", "-qq"], check=True)
    subprocess.run(["apt-get", *options, "download", "-qq", package], check=True, cwd=folder)
    (deb,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", deb, folder / package], check=True)
    return folder / package


def debian_mirror() -> str:
    """Where apt gets Debian's packages here."""
    told = ("--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages")
    listed = subprocess.run(["apt-get", "indextargets", *told], capture_output=True, text=True, check=False).stdout
    mirrors = [line.split()[0] for line in listed.splitlines() if "-" not in line.split()[-1]]
    if not mirrors:
        missing("apt knows no mirror of Debian: the images of others can neither be pulled nor made")
    return mirrors[0]
