"""What a diffusers scheduler config says in our words: process, prediction, solver, and the times of K steps.

The times are those that diffusers itself sets, so that a plan follows the pipeline as it is shipped. What a plan cannot
say is refused with what to do: above all PNDM, whose warm-up asks the network twice for the same time.
Checked against: diffusers' own pipelines, one a family (tests).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from engines.errors import NotBuilt
from engines.manifest import Betas, Kind, ProcessSpec, Schedule

_PREDICTIONS: dict[str, Kind] = {"flow_prediction": "flow", "epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_PRECONDITIONED: dict[str, Kind] = {"epsilon": "edm", "v_prediction": "v"}  # what the same words mean of EDM
_SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": "ddim",  # Euler in sigma (or in sigma / alpha) is the same straight line
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "EDMEulerScheduler": "ddim",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
}
# What our solvers and processes have not, by its name in a config, with the values that are built.
_BUILT: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "predict_x0": (True,),
    "thresholding": (False,),
    "clip_sample": (False,),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "invert_sigmas": (False,),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "disable_corrector": ([], ()),
    "stochastic_sampling": (False,),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "num_train_timesteps": (1000,),  # families tell their networks thousandths
}


_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_CHAIN = ("beta_start", "beta_end", "num_train_timesteps")
_EDM = ("sigma_data", "sigma_max")


@dataclass(frozen=True, slots=True)
class Shipped:
    process: ProcessSpec
    prediction: Kind
    solver: str


def read(config: Mapping[str, Any], process: ProcessSpec | None = None, prediction: Kind | None = None) -> Shipped:
    """What a scheduler says; `process` and `prediction` go before it. One that no plan can follow has solver ddim.

    Raises:
        NotBuilt: no process here has its noise.
    """
    name = str(config.get("_class_name"))
    return Shipped(
        process or _process(config, name), prediction or _prediction(config, name), _SOLVERS.get(name, "ddim")
    )


def schedule(
    config: Mapping[str, Any], steps: int, latent: tuple[int, int], sigmas: Sequence[float] | None = None
) -> Schedule:
    """The times at which diffusers takes `steps` steps with this scheduler.

    `latent` is height and width: some flows shift their times by its size. `sigmas` are what the pipeline asks a flow's
    Euler scheduler for.

    Raises:
        NotBuilt: the scheduler does what no plan can say.
    """
    name = str(config.get("_class_name"))
    scheduler, process = _scheduler(config, name), _process(config, name)
    asked: dict[str, Any] = {"num_inference_steps": steps}
    if sigmas is not None and "FlowMatch" in name:
        asked = {"sigmas": list(sigmas)}
    if config.get("use_dynamic_shifting"):
        asked["mu"] = _mu(config, latent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its conversions to NumPy
        scheduler.set_timesteps(**asked)
    told: list[float] = scheduler.timesteps.tolist()
    if process.betas:
        steps_of_chain = process.betas.steps
        return Schedule(times=(*((k + 1) / steps_of_chain for k in told), _end(scheduler, told) / steps_of_chain))
    times: list[float] = scheduler.sigmas.tolist()
    if process.ticks:
        times = [*(_within(t, k, process.ticks) for t, k in zip(times[:-1], told, strict=True)), times[-1]]
    return Schedule(times=tuple(times))


def _process(config: Mapping[str, Any], name: str) -> ProcessSpec:
    if "FlowMatch" in name:
        return ProcessSpec(kind="rf")
    if config.get("use_flow_sigmas"):
        return ProcessSpec(kind="rf", ticks=config["num_train_timesteps"])
    if _is_edm(name):
        _require(config, name, _EDM)
        return ProcessSpec(kind="edm", sigma_data=config["sigma_data"], sigma_max=config["sigma_max"])
    if config.get("beta_schedule") not in get_args(Betas.model_fields["curve"].annotation):
        raise NotBuilt(f"the noise of {name} has no process here: give `process` and `prediction`")
    _require(config, name, _CHAIN)
    return ProcessSpec(
        kind="ddpm",
        betas=Betas(
            curve=config["beta_schedule"],
            start=config["beta_start"],
            end=config["beta_end"],
            steps=config["num_train_timesteps"],
        ),
    )


def _require(config: Mapping[str, Any], name: str, keys: Sequence[str]) -> None:
    if lacking := [key for key in keys if key not in config]:
        raise NotBuilt(f"the config of {name} lacks {', '.join(lacking)}: write them there, or give `process`")


def _is_edm(name: str) -> bool:
    return name.startswith("EDM")


def _prediction(config: Mapping[str, Any], name: str) -> Kind:
    if "FlowMatch" in name:
        return "flow"
    said = config.get("prediction_type", "epsilon")  # what diffusers takes where a config says nothing
    known = _PRECONDITIONED if _is_edm(name) else _PREDICTIONS
    if said not in known:
        raise NotBuilt(f"{name} with prediction_type={said!r} is not built: it is none of {', '.join(known)}")
    return known[said]


def _scheduler(config: Mapping[str, Any], name: str) -> Any:
    """diffusers' own, which sets the times."""
    import diffusers

    if name not in _SOLVERS:
        raise NotBuilt(
            f"no plan follows {name} (PNDM asks twice for one time, ancestral ones draw noise in another place): save "
            f"the pipeline with one of {', '.join(_SOLVERS)}, or give the times yourself"
        )
    made = getattr(diffusers, name).from_config(dict(config))
    for key, built in _BUILT.items():
        if key in made.config and made.config[key] not in built:
            known = " or ".join(map(repr, built))
            raise NotBuilt(f"{name} with {key}={made.config[key]!r} is not built: set it to {known}")
    if (name in _MULTISTEP or _is_edm(name)) and made.config.final_sigmas_type != "zero":
        raise NotBuilt(
            f"{name} with final_sigmas_type={made.config.final_sigmas_type!r} is not built: set it to 'zero'"
        )
    if name == "EulerDiscreteScheduler" and made.config.timestep_spacing != "leading":
        spacing = made.config.timestep_spacing
        raise NotBuilt(
            f"{name} with timestep_spacing={spacing!r} starts from less than unit noise: set it to 'leading'"
        )
    return made


def _mu(config: Mapping[str, Any], latent: tuple[int, int]) -> float:
    """The dynamic shift of arXiv 2403.03206 as FLUX has it: linear in the number of 2 x 2 patches."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    patches = (latent[0] // 2) * (latent[1] // 2)
    return float(low + (high - low) * (patches - few) / (many - few))


def _end(scheduler: Any, told: Sequence[float]) -> int:
    """Where a chain ends, counted in its steps from clean data.

    DDIM steps a fixed number of them back from each, whatever is asked next: the two must be the same.
    """
    if type(scheduler).__name__ != "DDIMScheduler":
        return 0 if scheduler.config.final_sigmas_type == "zero" else 1
    stride = scheduler.config.num_train_timesteps // len(told)
    if any(k - stride != following for k, following in pairwise(told)):
        raise NotBuilt(
            f"DDIMScheduler with timestep_spacing={scheduler.config.timestep_spacing!r} does not step from time to "
            f"time in {len(told)} steps: use 'leading', or a count that divides {scheduler.config.num_train_timesteps}"
        )
    if told[-1] >= stride:
        return int(told[-1] - stride) + 1
    return 0 if scheduler.config.set_alpha_to_one else 1


def _within(t: float, tick: float, ticks: int) -> float:
    """`t`, moved by no more than rounding so that it lies inside its tick in single precision too."""
    return min(max(t, (tick + 0.002) / ticks), (tick + 0.998) / ticks)
