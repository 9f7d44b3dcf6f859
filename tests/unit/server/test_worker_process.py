"""How a worker's threads are cut into streams by its settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.backends.tensorrt import TensorRt
from engines.errors import InvalidRequest
from engines.loader import Loader
from engines.registry.memory import MemoryRegistry
from server.settings import WorkerSettings
from server.worker_process import make_loader


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    """They are the whole process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loader(folder: Path, **given: Any) -> Loader:
    told = {"redis_url": "memory:", "registry_url": "memory:", "cache_dir": folder, "device": "cpu", **given}
    return make_loader(WorkerSettings.model_validate(told), MemoryRegistry())


def test_streams_share_the_threads(tmp_path: Path) -> None:
    made = loader(tmp_path, backend="openvino", threads=4, streams=2)
    assert (made.profile.streams, made.profile.threads, made.most_streams, made.settled) == (2, 2, 2, True)


def test_left_to_itself_it_has_one_stream_until_it_has_measured(tmp_path: Path) -> None:
    made = loader(tmp_path, backend="openvino", threads=4)
    assert (made.profile.streams, made.profile.threads, made.most_streams, made.settled) == (1, 4, 4, False)


@pytest.mark.parametrize("backend", ["eager", "paced"])
def test_a_backend_that_makes_one_call_at_a_time_is_given_no_more(tmp_path: Path, backend: str) -> None:
    made = loader(tmp_path, backend=backend, threads=4)
    assert (made.profile.streams, made.profile.threads, made.most_streams) == (1, 4, 1)
    with pytest.raises(InvalidRequest, match=f"WORKER_STREAMS=2: {backend} on cpu makes one call at a time"):
        loader(tmp_path, backend=backend, threads=4, streams=2)


def test_more_streams_than_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="WORKER_STREAMS=3: there are 2 threads"):
        loader(tmp_path, backend="openvino", threads=2, streams=3)


def test_a_precision_that_versions_are_specialised_in_needs_that_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRt, "available", lambda self: True)
    with pytest.raises(InvalidRequest, match=r"fp8 is what versions are specialised in.*WORKER_SPECIALISE_AFTER_S"):
        loader(tmp_path, backend="tensorrt", precision="fp8", threads=1)
    made = loader(tmp_path, backend="tensorrt", precision="fp8", threads=1, specialise_after_s=60)
    assert made.scaled
