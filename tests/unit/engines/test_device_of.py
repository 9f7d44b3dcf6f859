"""Where engines compute, on machines with a GPU and without."""

import pytest
import torch

from engines import plugins
from engines.backends.base import choose, device_of, load_backend
from engines.errors import BackendUnavailable

ON_GPU = {
    "eager": True,
    "onnxruntime": False,
    "openvino": False,
    "paced": False,
    "tensorrt": True,
    "torch_compile": True,
}
"""With the packages of `constraints.txt`: its onnxruntime is the one for processors."""


def test_every_backend_says_whether_it_uses_a_gpu() -> None:
    assert {name: load_backend(name).on_gpu for name in plugins.names("engines.backends")} == ON_GPU


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_the_gpu_for_the_backends_that_use_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    expected = {name: "cuda" if there and uses else "cpu" for name, uses in ON_GPU.items()}
    assert {name: device_of(name) for name in ON_GPU} == expected


def test_a_gpu_is_not_asked_of_a_backend_that_uses_none() -> None:
    assert device_of("openvino", "cpu") == "cpu"
    assert device_of("eager", "cuda:1") == "cuda:1"
    with pytest.raises(BackendUnavailable, match=r"openvino computes on the processor here, not on cuda:1"):
        device_of("openvino", "cuda:1")
    with pytest.raises(BackendUnavailable, match="paced"):
        choose("paced", device="cuda")


def test_what_is_chosen_by_itself_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(device="cpu").backend == choose().backend == "openvino"
    found = choose(device="cuda")
    assert (found.backend, found.precision) == ("torch_compile", "bf16")
