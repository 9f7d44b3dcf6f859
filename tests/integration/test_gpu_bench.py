"""The bench of a GPU with its smallest network on a processor: a real Redis, gateway and worker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)  # several processes import torch and diffusers
def test_pictures_come_through_the_gateway_beside_the_engines_alone(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ("--parts", "pictures", "--forms", "engine", "gateway", "--out", str(out), "--cache", str(tmp_path / "c"))
    command = [sys.executable, "-m", "bench.gpu", "--quick", "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engine, gateway = json.loads(out.read_text())["cells"]
    assert (engine["form"], gateway["form"]) == ("engine", "gateway")
    assert "failed" not in gateway
    for steps in ("1", "2", "4"):
        alone, served = engine["pictures"][steps], gateway["pictures"][steps]
        assert served["alone_ms"]["median"] > served["alone_in_engines_ms"] > 0
        assert gateway["of_engines"][steps]["per_s"] == pytest.approx(served["per_s"] / alone["per_s"], abs=1e-3)
        assert gateway["share_of_peak"][steps] > 0
    assert not (tmp_path / "c" / "tiny-16").exists()
