"""How a network from elsewhere is asked: its schedules, solver, prediction and guidance, from what its owner knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engines import process, recipes, solvers
from engines.errors import InvalidManifest, InvalidRequest
from engines.manifest import Guidance, Kind, ProcessSpec, Schedule, StudentManifest


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the student is to be sampled; what is None or empty comes from the recipe, then from the base.

    Each of `times` is one step count: times of the process (0..1), or a chain's steps (above 1) as diffusers counts
    them; clean data at the end may be left out. `guidance` is the default weight and `guidance_max` the largest.
    """

    recipe: str | None = None
    steps: tuple[int, ...] = ()
    times: tuple[tuple[float, ...], ...] = ()
    eta: tuple[float, ...] = ()
    shift: float = recipes.SHIFT
    solver: str | None = None
    prediction: Kind | None = None
    guidance: float | None = None
    guidance_max: float | None = None
    guidance_mode: Literal["none", "baked", "cfg", "embedded"] | None = None


@dataclass(frozen=True, slots=True)
class Contract:
    """The part of a manifest that says how a student is asked."""

    schedules: Mapping[int, Schedule]
    solver: str
    prediction: Kind
    guidance: Guidance
    inputs: frozenset[Literal["s", "w"]]


def contract(sampling: Sampling, base: StudentManifest, inputs: frozenset[Literal["s", "w"]]) -> Contract:
    """What `sampling` means for a network of the base's process that reads `inputs` (pure).

    Raises:
        InvalidRequest: a schedule is missing or contradicts itself.
        InvalidManifest: the solver cannot do it.
    """
    recipe = recipes.of(sampling.recipe) if sampling.recipe else None
    schedules = _schedules(sampling, base.process, recipe)
    prediction = sampling.prediction or base.prediction
    if recipe and recipe.one_step and 1 in schedules and not sampling.prediction:
        if len(schedules) > 1:
            raise InvalidRequest(
                f"--as {sampling.recipe}: its one-step student is another network, which predicts the picture: import "
                "it by itself",
                param="steps",
            )
        prediction = recipe.one_step
    solver = sampling.solver or ("ddim" if recipe else base.solver)
    for steps, schedule in schedules.items():
        try:
            solvers.make(solver, process.make(base.process), prediction, schedule.expand(None, None, "denoiser"))
        except InvalidManifest as error:
            raise InvalidManifest(f"{steps} steps: {error.message}", param="solver") from error
    return Contract(schedules, solver, prediction, _guidance(sampling, base, inputs, recipe), inputs)


def _schedules(sampling: Sampling, spec: ProcessSpec, recipe: recipes.Recipe | None) -> dict[int, Schedule]:
    if sampling.times:
        made = [_timed(times, sampling.steps, spec) for times in sampling.times]
        if sampling.steps and sorted(sampling.steps) != sorted(schedule.steps for schedule in made):
            counts = ", ".join(str(schedule.steps) for schedule in made)
            raise InvalidRequest(f"--steps and --times differ: the times are of {counts} steps", param="times")
    elif recipe is None:
        known = ", ".join(recipes.RECIPES)
        raise InvalidRequest(
            f"no times: a network does not know them. Give --times for each step count, or --as ({known})",
            param="times",
        )
    elif not sampling.steps:
        raise InvalidRequest("no steps: say how many with --steps, such as --steps 4", param="steps")
    else:
        made = [Schedule(times=recipe.times(spec, steps, sampling.shift)) for steps in sampling.steps]
    return {schedule.steps: _with_eta(schedule, sampling, spec, recipe) for schedule in made}


def _timed(times: Sequence[float], steps: Sequence[int], spec: ProcessSpec) -> Schedule:
    ends_told = times[-1] == 0 or len(times) - 1 in steps
    begun = list(times[:-1] if ends_told else times)
    end = times[-1] if ends_told else 0.0
    if any(t > 1 for t in times) and spec.kind in ("rf", "ddpm"):
        if spec.betas is None:
            raise InvalidRequest(f"times of a flow lie in 0..1, not {times}: divide by 1000", param="times")
        begun = list(recipes.timesteps(spec.betas, [round(t) for t in begun])[:-1])
        end = (end + 1) / spec.betas.steps if end else 0.0
    try:
        return Schedule(times=(*begun, end))
    except ValueError as error:
        raise InvalidRequest(f"--times {','.join(f'{t:g}' for t in times)}: they must fall", param="times") from error


def _with_eta(schedule: Schedule, sampling: Sampling, spec: ProcessSpec, recipe: recipes.Recipe | None) -> Schedule:
    """With the noise shares that were asked for, or with the recipe's for these times."""
    if not sampling.eta:
        return Schedule(times=schedule.times, eta=recipe.eta(spec, schedule.times)) if recipe else schedule
    eta = sampling.eta[0] if len(sampling.eta) == 1 else sampling.eta
    try:
        return Schedule(times=schedule.times, eta=eta)
    except ValueError as error:
        said = ",".join(f"{share:g}" for share in sampling.eta)
        raise InvalidRequest(
            f"--eta {said}: give one share in 0..1, or one for each of the {schedule.steps} steps", param="eta"
        ) from error


def _guidance(
    sampling: Sampling, base: StudentManifest, inputs: frozenset[str], recipe: recipes.Recipe | None
) -> Guidance:
    """Off, unless a weight is given or the network reads one."""
    w, most = sampling.guidance, sampling.guidance_max
    mode = sampling.guidance_mode or ("embedded" if "w" in inputs else "none" if w in (None, 1.0) else "cfg")
    if (mode == "embedded") != ("w" in inputs):
        reads = "reads a guidance weight" if "w" in inputs else "reads no guidance weight"
        raise InvalidRequest(f"--guidance-mode {mode}: this network {reads}", param="guidance_mode")
    if mode == "none":
        if w not in (None, 1.0):
            raise InvalidRequest(f"--guidance {w:g} and --guidance-mode none contradict each other", param="guidance")
        return Guidance()
    if mode == "baked":
        if w is None:
            raise InvalidRequest("--guidance-mode baked: say which weight with --guidance", param="guidance")
        return Guidance(mode="baked", default=w, minimum=w, maximum=w)
    own = base.guidance.default if base.guidance.mode == mode else 1.0
    usual = own if own != 1.0 or recipe is None else recipe.guidance or 1.0  # what is only described says 1
    default = usual if w is None else w
    ceiling = max(default, base.guidance.maximum if base.guidance.mode == mode else default) if most is None else most
    try:
        return Guidance(mode=mode, default=default, maximum=ceiling)
    except ValueError as error:
        raise InvalidRequest(f"guidance {default:g} is outside 1..{ceiling:g}", param="guidance") from error
