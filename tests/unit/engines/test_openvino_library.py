"""OpenVINO tells nobody that it is used, and leaves signals alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_what_reports_to_its_makers_is_not_loaded_with_it() -> None:
    script = (
        "from engines.backends._openvino_library import ov\n"
        "import sys\n"
        "print([name for name, module in sys.modules.items() if module and name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_signal_is_heard_after_models_have_come_and_gone() -> None:
    script = (
        "import os, signal, onnx.parser\n"
        "from engines.backends.openvino import _compile\n"
        "text = 'g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'\n"
        "relu = onnx.parser.parse_model(f'<ir_version: 10, opset_import: [\"\": 21]> {text}').SerializeToString()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        "first, second = (_compile(relu, rows, 'fp32') for rows in (1, 2))\n"
        "del first\n"
        "del second\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "heard"), done.stderr


@pytest.mark.parametrize("what", [r"^\s*(import|from) openvino\b", r"\bov\.Core\("])
def test_nobody_else_imports_it_or_makes_a_core(what: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("engines", "server", "distill_jobs", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(what, path.read_text(), re.MULTILINE)
    }
    assert found == {"engines/backends/_openvino_library.py"}
