"""Many small pictures as one PNG; `python -m distill_jobs.teachers.contact_sheet` makes one of real pictures.

The file is written by hand, so that numpy alone is needed.
"""

from __future__ import annotations

import argparse
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_jobs.tasks import base as tasks


def tile(pixels: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Tiles pictures [N, 3, H, W] into one [3, rows · H, columns · W]."""
    n, _, height, width = pixels.shape
    rows = -(-n // columns)
    tiles = np.zeros((rows * columns, 3, height, width), dtype=np.uint8)
    tiles[:n] = pixels
    grid = tiles.reshape(rows, columns, 3, height, width).transpose(2, 0, 3, 1, 4)
    return grid.reshape(3, rows * height, columns * width)


def write_png(picture: npt.NDArray[np.uint8], path: Path) -> None:
    """Writes one [3, H, W] picture."""
    _, height, width = picture.shape
    lines = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    lines[:, 1:] = picture.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a sheet of a task's captioned pictures.")
    parser.add_argument("--task", default=tasks.DEFAULT)
    parser.add_argument("--sheet", type=Path, required=True, help="PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="pixels; the task's own if missing")
    parser.add_argument("--split", choices=("train", "heldout", "all"), default="train")
    options = parser.parse_args()
    drawn = tasks.load(options.task).sample(64, options.seed, split=options.split, size=options.size)
    write_png(tile(drawn.pixels, 8), options.sheet)


if __name__ == "__main__":
    main()
