"""How a real worker process ends when it is told to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.eventually import eventually
from tests.faults.serving import published
from tests.redis_server import RedisServer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer().start()
    yield server
    server.close()


def test_a_worker_that_is_told_to_end_while_it_compiles_ends_well_and_at_once(
    redis: RedisServer, tmp_path: Path
) -> None:
    published(tmp_path)
    told = {
        "REDIS_URL": redis.url,
        "REGISTRY_URL": str(tmp_path / "registry"),
        "CACHE_DIR": str(tmp_path / "cache"),
        "BACKEND": "eager",
        "BATCH_SIZES": "[1]",
        "THREADS": "1",
        "SPECIALISE_AFTER_S": "0",
    }
    compiles = tmp_path / "compiles"
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.compiling_worker", str(compiles)],
        env=os.environ | {f"WORKER_{name}": value for name, value in told.items()},
    )
    try:
        eventually(compiles.exists, 500)
        [elsewhere] = eventually(psutil.Process(worker.pid).children, 60)
        worker.terminate()
        assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()
    gone, _ = psutil.wait_procs([elsewhere], timeout=10)
    assert gone == [elsewhere]
