"""One engine with all images, for all tests of containers."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containers import stand_ins
from tests.containers.engine import ROOT, Engine, running


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """Not in pytest's own folder: what a killed engine leaves mounted would keep later runs from tidying up."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-containers-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def engine(scratch: Path) -> Iterator[Engine]:
    with running(scratch / "docker") as started:
        yield started


@pytest.fixture(scope="session")
def images(engine: Engine, scratch: Path, record_testsuite_property: Callable[[str, object], None]) -> Path:
    """Builds them as `make images` does; the folder of what is written beside them."""
    folder = scratch / "images"
    folder.mkdir()
    stand_ins.ensure(engine, folder)
    build_base = stand_ins.build_base(engine, folder)
    env = {**engine.env, "DOCKER": engine.program, "BUILD_ARGS": f"--build-arg BUILD_BASE={build_base}"}
    if build_base != stand_ins.BASE:
        env.setdefault("TORCH_PIP_ARGS", "")
    done = subprocess.run([ROOT / "docker" / "build.sh", folder], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    for image, size in re.findall(r"^(\S+) (\d+ bytes)$", done.stdout, re.M):
        record_testsuite_property(image, size)
    return folder
