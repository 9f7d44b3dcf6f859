"""A system that is copied while it serves, dies, and is put back elsewhere: nothing that it had accepted is missing."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
import redis

from server.embedded import REDIS_URL, Stack
from tests.eventually import eventually
from tests.faults.serving import MODEL, PROMPTS, STEPS, Asked, check_pictures, options, published, unfinished

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
_ASKED = 60


def fewstep(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", "server.cli", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accepted(http: httpx.Client, number: int) -> str:
    """A request that says nothing but that it was accepted. Its id."""
    asked = {"model": MODEL, "prompt": PROMPTS[number % 2], "seed": number % 6, "steps": STEPS, "timeout_ms": 500_000}
    response = http.post("/v1/generations", json=asked, headers={"prefer": "respond-async"})
    assert response.status_code == 202
    return str(response.json()["id"])


def ended(http: httpx.Client, request_id: str) -> str:
    """How a request ended; "" while it has not."""
    status = http.get(f"/v1/generations/{request_id}").raise_for_status().json()["status"]
    return "" if status in ("queued", "running") else str(status)


def test_a_restored_system_answers_all_that_was_accepted_before_the_copy(tmp_path: Path) -> None:
    old, new, copy = tmp_path / "old", tmp_path / "new", tmp_path / "copy"
    version = published(old)
    with Stack(options(old, workers=1)) as stack, httpx.Client(base_url=stack.url) as http:
        ids = [accepted(http, number) for number in range(_ASKED // 2)]
        eventually(lambda: ended(http, ids[0]), 60)
        os.kill(stack.supervisor.pid("worker-0"), signal.SIGSTOP)  # what it has claimed is with it, the rest waits
        ids += [accepted(http, number) for number in range(_ASKED // 2, _ASKED)]
        fewstep("backup", str(copy), "--data", str(old))
        with redis.Redis.from_url(stack.redis_url, decode_responses=True) as client:
            assert len(unfinished(client)) >= _ASKED // 2
        stack.supervisor.kill()

    assert not (old / REDIS_URL).exists()  # nobody copies what has this port next

    fewstep("restore", str(copy), "--data", str(new))
    with Stack(options(new, workers=1)) as stack, httpx.Client(base_url=stack.url) as http:
        good = []
        for number, request_id in enumerate(ids):
            assert eventually(partial(ended, http, request_id), 120) == "succeeded"
            picture = http.get(f"/v1/generations/{request_id}/images/0").raise_for_status()
            good.append(_asked(request_id, number, picture.content, version))
        check_pictures(good, stack, version)


def _asked(request_id: str, number: int, picture: bytes, version: str) -> Asked:
    return Asked(
        key=request_id,
        prompt=PROMPTS[number % 2],
        seed=number % 6,
        tries=1,
        status=200,
        version=version,
        request_id=request_id,
        body=picture,
        code="",
    )
