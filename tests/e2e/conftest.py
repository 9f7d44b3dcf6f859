"""A whole, small job on the running system: minutes of training are for the benches."""

import pytest

from server.client import Client

SMALL_JOB = {
    "teacher": {"id": "shapes"},
    "student": {"name": "shapes-small", "steps": [1, 4]},
    "method": {"name": "kd", "pairs": 32, "batch": 8, "teacher_steps": 8},
    "schedule": {"name": "optimal_steps", "batch": 4, "fine": 8, "reference_steps": 8},
    "data": {"prompts": "shapes"},
    "train": {"iterations": 24, "seed": 0},
    "eval": {"samples": 32, "small_samples": 16, "every": 12},
    "publish": {"deployment": "shapes", "tiers": {"low": 1, "medium": 4}},
    # What this student draws is bad, and that is not what is tested here.
    "gates": {"fd_ratio": 1e6, "alignment_ratio": 1e-6, "diversity_ratio": 1e-6, "grain_ratio": 1e6},
}


@pytest.fixture(scope="session")
def small_job(client: Client) -> str:
    """The id of a submitted job that will end with a live student."""
    job_id: str = client.post("/v1/distillation/jobs", SMALL_JOB)["id"]
    return job_id
