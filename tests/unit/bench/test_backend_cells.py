"""Which cells the bench of backends measures."""

import pytest

from bench.backends import cells
from engines.backends.tensorrt import TensorRt


def test_precisions_that_take_scales_of_a_student_are_no_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRt, "available", lambda self: True)
    found = [cell["precision"] for cell in cells() if cell["backend"] == "tensorrt"]
    assert found == ["fp32", "bf16"]
