"""OpenVINO tells nobody that it is used."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_what_reports_to_its_makers_is_not_loaded_with_it() -> None:
    script = (
        "from engines.backends._openvino_library import ov\n"
        "import sys\n"
        "ov.Core()\n"
        "print([name for name, module in sys.modules.items() if module and name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nobody_imports_it_in_another_way() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("engines", "server", "distill_jobs", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import openvino", "from openvino"))
    }
    assert found == {"engines/backends/_openvino_library.py"}
