"""The files that the chart brings along: dashboards of docker/grafana and alert rules of docker/prometheus, copied.

A chart reads only what lies inside it, so these are copies; a test says that they are equal. `make chart-files`.
"""

import shutil
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {
    "dashboards": (HERE.parent / "docker" / "grafana" / "dashboards", "*.json"),
    "rules": (HERE.parent / "docker" / "prometheus" / "rules", "*.yml"),
}
FILES = HERE / "fewstep" / "files"


def originals() -> dict[str, bytes]:
    """Name inside `files/` -> content."""
    return {
        f"{folder}/{path.name}": path.read_bytes()
        for folder, (source, pattern) in SOURCES.items()
        for path in sorted(source.glob(pattern))
    }


def copies() -> dict[str, bytes]:
    """What lies in `files/` now."""
    return {str(path.relative_to(FILES)): path.read_bytes() for path in sorted(FILES.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    wanted = originals()
    shutil.rmtree(FILES, ignore_errors=True)
    for name, data in wanted.items():
        (FILES / name).parent.mkdir(parents=True, exist_ok=True)
        (FILES / name).write_bytes(data)
