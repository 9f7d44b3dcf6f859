"""How students of the kinds that people have are sampled: LCM, Lightning, Turbo and Hyper-SD, at any step count.

Each recipe gives the times and noise shares that the kind's published schedulers take, on the chains of Stable
Diffusion and SDXL; on a rectified flow, whose pipelines shift equal steps, the times of that shift.
Source: LCM arXiv 2310.04378 and diffusers' LCMScheduler; SDXL-Lightning 2402.13929 (Euler, trailing); ADD 2311.17042
(SDXL-Turbo: ancestral Euler, trailing); Hyper-SD 2404.13686 (DDIM, trailing). Checked against: diffusers' schedulers
of these names (tests). Euler with trailing times starts a chain from .998 of unit noise, and we from all of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from engines import process
from engines.errors import InvalidRequest, NotBuilt
from engines.manifest import Betas, Kind, ProcessSpec
from engines.process import Process

SHIFT = 3.0
"""Of a flow, where no other is given: what SD3.5-Turbo, Z-Image-Turbo and the Lightning LoRAs of Qwen-Image ship."""
_TAUGHT = 50  # the DDIM steps among which an LCM is taught


@dataclass(frozen=True, slots=True)
class Recipe:
    """`chain` gives the times of a discrete chain; `share` is eta, of all steps, or of a chain's alone where it is
    ancestral. `one_step` is what the one-step student of the kind predicts, if not what its base does. `guidance` is
    the usual weight of networks that read one."""

    said: str
    chain: Callable[[Betas, int], tuple[float, ...]]
    share: float = 0.0
    ancestral: bool = False
    one_step: Kind | None = None
    guidance: float | None = None

    def times(self, spec: ProcessSpec, steps: int, shift: float = SHIFT) -> tuple[float, ...]:
        """Of `steps` steps.

        Raises:
            InvalidRequest: this kind has no such count.
            NotBuilt: its times in this process are not known.
        """
        if steps < 1:
            raise InvalidRequest(f"steps={steps}: a picture takes at least one", param="steps")
        if spec.betas:
            return self.chain(spec.betas, steps)
        if spec.kind == "rf":
            even = [1 - i / steps for i in range(steps + 1)]
            return tuple(shift * u / (1 + (shift - 1) * u) for u in even)
        raise NotBuilt(f"no recipe is for the process {spec.kind}: give the times and eta yourself")

    def eta(self, spec: ProcessSpec, times: Sequence[float]) -> float | tuple[float, ...]:
        """The noise shares of these times."""
        if self.ancestral and spec.betas:
            return tuple(_ancestral(process.make(spec), t, s) for t, s in pairwise(times))
        return self.share


def timesteps(betas: Betas, told: Sequence[int], end: float = 0.0) -> tuple[float, ...]:
    """Our times of a chain's steps, as diffusers counts them from 0, and the end after them."""
    return (*((k + 1) / betas.steps for k in told), end)


def _taught(betas: Betas, steps: int) -> tuple[float, ...]:
    """Every (50 / steps)-th of the steps that an LCM was taught at."""
    if steps > _TAUGHT:
        raise InvalidRequest(f"steps={steps}: an LCM is taught at {_TAUGHT} times", param="steps")
    stride = betas.steps // _TAUGHT
    return timesteps(betas, [stride * (_TAUGHT - _TAUGHT * i // steps) - 1 for i in range(steps)])


def _trailing(betas: Betas, steps: int) -> tuple[float, ...]:
    return timesteps(betas, [round(betas.steps * (1 - i / steps)) - 1 for i in range(steps)])


def _trailing_ddim(betas: Betas, steps: int) -> tuple[float, ...]:
    """Ends where the chain begins, as DDIM does with set_alpha_to_one=false."""
    return (*_trailing(betas, steps)[:-1], 1 / betas.steps)


def _ancestral(chain: Process, t: float, s: float) -> float:
    """The share that takes noise level a to b by way of b^2 / a, with fresh noise for the rest."""
    if s == 0:
        return 0.0
    both = torch.tensor([t, s], dtype=torch.float64)
    a, b = (chain.sigma(both) / chain.alpha(both)).tolist()
    return 1 - chain.t_of_angle(torch.tensor([math.atan(b * b / a)], dtype=torch.float64)).item() / s


RECIPES: dict[str, Recipe] = {
    "lcm": Recipe("each step predicts the picture and renoises it (eta 1)", _taught, share=1.0, guidance=8.0),
    "lightning": Recipe("Euler at trailing times; a single step predicts the picture", _trailing, one_step="x0"),
    "turbo": Recipe("ancestral Euler at trailing times", _trailing, ancestral=True),
    "hyper-sd": Recipe("DDIM at trailing times", _trailing_ddim),
}


def of(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        InvalidRequest: there is none.
    """
    if name not in RECIPES:
        raise InvalidRequest(f"--as {name}: choose from {', '.join(RECIPES)}, or give --times yourself", param="as")
    return RECIPES[name]
