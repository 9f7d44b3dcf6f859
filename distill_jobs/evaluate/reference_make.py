"""Measures real pictures for the committed reference: `python -m distill_jobs.evaluate.reference_make`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from distill_jobs.evaluate import features, reference

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the real pictures that every evaluation is compared with.")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=reference.REAL)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for baseline in reference.make_real(options.out, options.size, features.load()):
        log.info("%s", baseline)


if __name__ == "__main__":
    main()
