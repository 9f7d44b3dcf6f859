"""One real system for all tests that need one: Redis, gateway, worker and distiller as `fewstep up` starts them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from server.client import Client
from server.embedded import Stack, StackOptions
from tests.eventually import PATIENCE

if TYPE_CHECKING:
    from tests.s3_server import S3Server

_SHARING_THE_STACK = "tests/e2e"


class _Files(LoadFileScheduling):
    """Hands out files in the order of collection; those that share the running system as one: it starts once."""

    def _split_scope(self, nodeid: str) -> str:
        return _SHARING_THE_STACK if nodeid.startswith(f"{_SHARING_THE_STACK}/") else super()._split_scope(nodeid)

    def remove_node(self, node: WorkerController) -> str | None:
        """What a process that died had finished is not handed out again: one that is given nothing waits for ever."""
        units = self.assigned_work[node]
        for scope in [scope for scope, done in units.items() if all(done.values())]:
            del units[scope]
        return super().remove_node(node)


@pytest.hookimpl(optionalhook=True)  # of a plugin that may be off
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Files | None:
    return _Files(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that may take longest come first: at the end one of them would keep a single process busy.

    Each may take `PATIENCE` times what it says before it counts as one that hangs.
    """
    longest: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        within_s = float(mark.args[0] if mark else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(within_s * PATIENCE), append=False)
        longest[item.path] = max(longest.get(item.path, 0.0), within_s)
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data: Path = tmp_path_factory.mktemp("stack")
    # Trainers yield to all else, and beside other tests they would hardly move.
    with Stack(StackOptions(data=data, port=0, env={"DISTILLER_NICE": "0"})) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    connected = Client(stack.url)
    yield connected
    connected.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """One real object store for all tests of a process, which has its keys, and so have its children."""
    from tests.s3_server import serving

    with serving() as server:
        yield server
