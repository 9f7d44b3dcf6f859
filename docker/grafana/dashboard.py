"""Writes the Grafana dashboards from code: `python docker/grafana/dashboard.py`. Each is one file of `boards/`."""

from pathlib import Path

from boards import distillation, serving, swaps, workers
from boards.board import Board

OUTPUT = Path(__file__).parent / "dashboards"
BOARDS: tuple[Board, ...] = (serving.BOARD, swaps.BOARD, distillation.BOARD, workers.BOARD)


def files() -> dict[Path, str]:
    """Every dashboard by the file that it belongs to."""
    return {OUTPUT / f"{board.uid}.json": board.build() for board in BOARDS}


if __name__ == "__main__":
    wanted = files()
    for path in set(OUTPUT.glob("*.json")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
