"""Every component of every family on the backends that run ONNX graphs: eager's numbers, each weight by its name."""

import pytest

from engines import plugins
from engines.backends.base import Choice, load_backend
from tests import tiny_families
from tests.contract.parts import Part, assert_close
from tests.tensorrt.graphs import GRAPHS, case

CHOICES = [Choice("onnxruntime", "fp32"), Choice("openvino", "fp32")]


@pytest.fixture(params=CHOICES, ids=lambda choice: choice.backend)
def choice(request: pytest.FixtureRequest) -> Choice:
    found: Choice = request.param
    assert load_backend(found.backend).available()
    return found


@pytest.mark.parametrize(("name", "role"), GRAPHS, ids=lambda value: value)
def test_each_component_equals_eager_and_reads_each_weight_under_its_own_name(
    choice: Choice, name: str, role: str
) -> None:
    part = Part(choice, case(name, role).graph, case(name, role).weights)
    assert_close(part.run(part.weights), part.expected(part.weights), choice)
    part.tells_weights_apart()


def test_every_family_file_is_compared_here() -> None:
    assert {tiny_families.shipped(name).manifest.family for name, _ in GRAPHS} == set(plugins.names("engines.families"))
