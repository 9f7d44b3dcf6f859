"""What a job is promised when it is submitted: the bytes of the tensors that its training will hold."""

from typing import Any

import pytest
import torch

from bench.lora_memory import LATENT, TOKENS, WIDTH, held, network
from distill_jobs import spec as specs
from distill_jobs.batches import TensorSource
from distill_jobs.estimate import weights_bytes
from distill_jobs.experts import Experts
from distill_jobs.lora import adapted
from distill_jobs.methods import _schemas
from distill_jobs.methods.base import Workspace
from distill_jobs.plan import drafted
from distill_jobs.preparation import stages
from distill_jobs.stage import StageRun
from distill_jobs.teachers.diffusers import blob_weights
from engines.denoiser import BaseDenoiser

QUICK = {"batch": 2, "pairs": 64, "generate": 64, "teacher_steps": 1} | dict.fromkeys(("fake_warmup", "disc_warmup"), 0)
ADVERSARIAL = {"name": "adversarial", "width": 96, "taps": ["mid_block", "attentions.0"]}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "one network": ({"name": "kd"}, "full"),
    "a critic": ({"name": "dmd"}, "full"),
    "a target that follows": ({"name": "lcm"}, "full"),
    "a discriminator": ({"name": "ladd", "width": 32}, "full"),
    "a term's discriminator": ({"name": "kd", "terms": [ADVERSARIAL]}, "full"),
    "two experts": ({"name": "kd", "batch": 8, "teacher_steps": 4}, {"experts": [0.8]}),
    "adapters": ({"name": "dmd"}, {"lora": {"rank": 8}}),
    "an adapter and a term's discriminator": ({"name": "kd", "terms": [ADVERSARIAL]}, {"lora": {"rank": 8}}),
}


@pytest.mark.parametrize(("method", "train"), CASES.values(), ids=CASES)
def test_the_bytes_are_those_of_what_training_holds(method: dict[str, Any], train: Any) -> None:
    """And of the best student so far, which a run keeps."""
    known = _schemas.schemas()[method["name"]]["config"]["properties"]
    told = {**{key: value for key, value in QUICK.items() if key in known}, **method}
    spec = specs.parse(
        {
            "teacher": {"id": "t"},
            "student": {"name": "s", "steps": [1]} | (train if "experts" in train else {"train": train}),
            "method": told,
            "train": {"iterations": 2, "ema": [0.9, 0.99]},
        }
    )
    torch.manual_seed(0)
    teacher = network((16, 32), layers=1)
    shapes = {name: tuple(value.shape) for name, value in blob_weights(teacher.state_dict()).items()}
    student: BaseDenoiser = network((16, 32), layers=1)
    if spec.student.lora is not None:
        student = adapted(teacher, spec.student.lora)
    if spec.student.experts is not None:
        student = Experts([network((16, 32), layers=1) for _ in range(2)], spec.student.experts)
    run = StageRun(0, stages(drafted(spec))[0], teacher, student, ema=spec.train.ema)
    source = TensorSource(torch.randn(2, TOKENS, WIDTH), LATENT)
    run.method.prepare(source, Workspace())
    for _ in range(1 if spec.student.experts is None else 4):  # until each expert was asked
        run.iterate(source)
    best = 4 * sum(weight.numel() for weight in run.cast.weights("student").values())
    assert weights_bytes(spec, shapes) == pytest.approx(sum(held(run).values()) + best, rel=0.002)
