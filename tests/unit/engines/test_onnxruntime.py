import pytest

from engines.backends.base import Profile
from engines.backends.onnxruntime import OnnxRuntime, providers
from engines.errors import BackendUnavailable, UnknownPlugin
from engines.graph import GraphStore, spec
from engines.parts import reader
from tests import tiny_sd

BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_profile_s_device_chooses_the_provider_whatever_else_is_installed() -> None:
    assert providers("cpu", BOTH) == ["CPUExecutionProvider"]
    (cuda, options), rest = providers("cuda:1", BOTH)
    assert (cuda, rest) == tuple(BOTH)
    assert options == {"device_id": "1", "use_tf32": "0"}


def test_a_gpu_is_refused_without_its_provider() -> None:
    with pytest.raises(BackendUnavailable, match="onnxruntime-gpu"):
        providers("cuda", BOTH[1:])


def test_bf16_is_refused_before_anything_is_exported() -> None:
    teacher = tiny_sd.teacher()
    graph = GraphStore(None).graph(spec(teacher.manifest, "denoiser", reader(teacher.registry, teacher.manifest)))
    with pytest.raises(UnknownPlugin, match="onnxruntime has no bf16"):
        OnnxRuntime().build(graph, Profile(precision="bf16"))
