"""Measures real pictures for a task's committed reference: `python -m distill_jobs.evaluate.reference_make`."""

from __future__ import annotations

import argparse
import logging

from distill_jobs.evaluate import features, reference
from distill_jobs.tasks import base as tasks

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the real pictures that every evaluation is compared with.")
    parser.add_argument("--task", default=tasks.DEFAULT)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    task = tasks.load(options.task)
    for baseline in reference.make_real(task.weights / reference.REAL, task.size_px, features.load(task)):
        log.info("%s", baseline)


if __name__ == "__main__":
    main()
