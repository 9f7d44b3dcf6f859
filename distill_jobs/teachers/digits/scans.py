"""The handwritten digits themselves: 1,797 scans of 8×8 cells by 13 people, from scikit-learn into one small file.

`python -m distill_jobs.teachers.digits.scans` writes it again and needs scikit-learn; nothing else does.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository 1998,
doi 10.24432/C50P49, licensed CC BY 4.0; scikit-learn ships its test part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

FILE = Path(__file__).with_name("scans.safetensors")
MOST_INK = 16
"""A cell was 4×4 pixels of black and white; its value counts the black ones."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scans:
    cells: Bytes  # [1797, 8, 8], ink 0..MOST_INK
    labels: Bytes  # [1797], 0..9

    def rows(self, digit: int) -> npt.NDArray[np.int64]:
        """Which scans show this digit."""
        return np.flatnonzero(self.labels == digit)


@functools.cache
def load() -> Scans:
    tensors = load_file(FILE)
    return Scans(tensors["cells"], tensors["labels"])


def from_scikit_learn() -> Scans:
    """What the package ships, in its own order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Scans(found.images.astype(np.uint8), found.target.astype(np.uint8))


def main() -> None:
    scans = from_scikit_learn()
    save_file({"cells": scans.cells, "labels": scans.labels}, FILE)


if __name__ == "__main__":
    main()
