"""What diffusers must be told to sample a student as we do: a scheduler's config, and the noise levels of each count.

`UniPCMultistepScheduler` over flow sigmas is the one scheduler of diffusers that takes any noise levels and has what
StableDiffusionPipeline asks of one. Of first order without its corrector it is DDIM (and Euler); of second order
without it DPM-Solver++(2M); with it UniPC.

It tells the network whole timesteps only, cut off after the first noise level was lowered by 1e-6. Of 1000 timesteps a
step at t = 1 would be asked as .999; of 1001 every whole thousandth is told exactly. Times between them are off by less
than a thousandth, which is the only difference that remains.

Checked against: diffusers 0.42 scheduling_unipc_multistep.py (tests).
"""

from dataclasses import dataclass
from typing import Any

import torch

from engines import process
from engines.errors import NotBuilt
from engines.manifest import Kind, StudentManifest, shown

SCHEDULER = "UniPCMultistepScheduler"
_PREDICTIONS: dict[Kind, str] = {
    "flow": "flow_prediction", "eps": "epsilon", "x0": "sample",
}  # fmt: skip
_ORDERS = {"ddim": 1, "euler": 1, "flow_match_euler": 1, "dpmpp_2m": 2, "unipc": 2}
_CORRECTED = ("unipc",)
_TIMESTEPS = 1001


@dataclass(frozen=True, slots=True)
class Sampling:
    """One step count: `config` for the scheduler, `sigmas` and `guidance_scale` for the pipeline's call."""

    config: dict[str, Any]
    sigmas: tuple[float, ...]
    guidance_scale: float

    def as_dict(self) -> dict[str, Any]:
        return {"sigmas": list(self.sigmas), "guidance_scale": self.guidance_scale, "scheduler": self.config}


def samplings(manifest: StudentManifest) -> dict[int, Sampling]:
    """Every step count that diffusers can sample as we do.

    Raises:
        NotBuilt: it can sample none; the reason of the largest count.
    """
    found: dict[int, Sampling] = {}
    reason = ""
    for steps in sorted(manifest.schedules):
        try:
            found[steps] = sampling(manifest, steps)
        except NotBuilt as error:
            reason = error.message
    if not found:
        raise NotBuilt(reason)
    return found


def sampling(manifest: StudentManifest, steps: int) -> Sampling:
    """One step count of a student.

    Raises:
        NotBuilt: diffusers has no scheduler for it.
        StepsNotAllowed: the student was not made for this count.
    """
    plan, name = manifest.plan(steps), manifest.solver_for(steps)
    times = torch.tensor([*(step.t for step in plan), plan[-1].s], dtype=torch.float64)
    sigmas = process.make(manifest.process).sigma(times).tolist()
    first, last = sigmas[0], sigmas[-1]
    faults = {
        f"noises by {manifest.process.kind}, and only rf is built": manifest.process.kind != "rf",
        f"goes from noise level {first:g} to {last:g}, not from 1 to 0": (first, last) != (1, 0),
        f"predicts {manifest.prediction}, which diffusers knows not of flows": manifest.prediction not in _PREDICTIONS,
        "has a time shift in its process": manifest.process.shift != 1,
        "re-noises between its steps": any(step.eta > 0 for step in plan[:-1]),
        "is guided in some steps only": len({step.w for step in plan}) > 1,
        "changes networks between its steps": {step.net for step in plan} != {"denoiser"},
        f"is sampled by {name}": name not in _ORDERS,
    }
    if fault := next((text for text, true in faults.items() if true), None):
        raise NotBuilt(f"{shown(manifest.version)} at {steps} steps {fault}: no scheduler of diffusers does the same")
    return Sampling(_config(manifest, steps, name), tuple(sigmas[:-1]), plan[0].w or 1.0)


def _config(manifest: StudentManifest, steps: int, solver: str) -> dict[str, Any]:
    return {
        "_class_name": SCHEDULER,
        "num_train_timesteps": _TIMESTEPS,
        "steps_offset": 1,
        "prediction_type": _PREDICTIONS[manifest.prediction],
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "solver_type": "bh2",
        "solver_order": _ORDERS[solver],
        "lower_order_final": True,
        "disable_corrector": [] if solver in _CORRECTED else list(range(steps)),
    }
