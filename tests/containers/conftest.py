"""One engine with all images, for all tests of containers."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers import stand_ins
from tests.containers.engine import ROOT, Engine, running


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running(tmp_path_factory.mktemp("docker")) as started:
        yield started


@pytest.fixture(scope="session")
def images(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds them as `make images` does; the folder of what is written beside them."""
    folder = tmp_path_factory.mktemp("images")
    stand_ins.ensure(engine, folder)
    build_base = stand_ins.build_base(engine, folder)
    env = {**engine.env, "DOCKER": engine.program, "BUILD_ARGS": f"--build-arg BUILD_BASE={build_base}"}
    if build_base != stand_ins.BASE:
        env.setdefault("TORCH_PIP_ARGS", "")
    done = subprocess.run([ROOT / "docker" / "build.sh", folder], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stdout)  # noqa: T201
    return folder
