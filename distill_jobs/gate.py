"""The gate: which step counts of a student may serve, judged against its guided teacher (pure).

Every rule compares one measured figure with one limit on its point estimate; the interval stands
beside it. A figure that is missing or not a number fails: what was not measured did not pass.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from distill_jobs.spec import GateSpec


class Distances(Protocol):
    """Fréchet distances in one feature network over those of the guided teacher."""

    @property
    def fd_ratio(self) -> float | None: ...
    @property
    def fd_ratio_ci(self) -> tuple[float, float] | None: ...


class Ratios(Distances, Protocol):
    """What was measured of one step count over what was measured of the guided teacher; None: it was not.

    `distill_jobs.evaluate.report.Metrics` is one. Grain is compared with a quarter level on both sides.
    """

    @property
    def alignment_ratio(self) -> float | None: ...
    @property
    def diversity_ratio(self) -> float | None: ...
    @property
    def grain_ratio(self) -> float | None: ...
    @property
    def alignment_forgotten(self) -> float | None: ...
    @property
    def networks(self) -> Mapping[str, Distances]: ...


@dataclass(frozen=True, slots=True)
class GateResult:
    """One rule at one step count. `at_most` says on which side of `limit` the value must lie."""

    rule: str
    steps: int
    value: float | None
    limit: float
    at_most: bool
    passed: bool
    interval: tuple[float, float] | None = None

    @property
    def sentence(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.3f}"
        verdict = "within" if self.passed else "outside"
        side = "at most" if self.at_most else "at least"
        return f"{self.rule} at {self.steps} steps is {value}, {verdict} its limit ({side} {self.limit:g})"


@dataclass(frozen=True, slots=True)
class Verdict:
    results: tuple[GateResult, ...]
    steps: tuple[int, ...]

    @property
    def passing(self) -> tuple[int, ...]:
        """The step counts that kept every rule."""
        failed = {result.steps for result in self.results if not result.passed}
        return tuple(count for count in self.steps if count not in failed)

    @property
    def failures(self) -> tuple[GateResult, ...]:
        return tuple(result for result in self.results if not result.passed)

    def passing_tiers(self, tiers: Mapping[str, int]) -> dict[str, int]:
        return {tier: count for tier, count in tiers.items() if count in self.passing}

    def as_dict(self, tiers: Mapping[str, int]) -> dict[str, Any]:
        """As the API shows it; `passed` if every tier that was to be published did (every count if none was)."""
        wanted = set(tiers.values()) or set(self.steps)
        return {
            "passed": wanted <= set(self.passing),
            "passed_steps": list(self.passing),
            "results": [asdict(result) for result in self.results],
        }


_AT_MOST = {
    "fd_ratio": True,
    "alignment_ratio": False,
    "diversity_ratio": False,
    "grain_ratio": True,
    "alignment_forgotten": True,
    "latency_ms": True,
}


def judge(
    gates: GateSpec,
    student: Mapping[int, Ratios],
    latency_ms: Mapping[int, float] | None = None,
    *,
    forgets: bool = False,
) -> Verdict:
    """Judges every step count of the student by every rule that has a limit; by what is left of a concept where the
    student is to forget one. All other figures are then those of the other prompts."""
    results: list[GateResult] = []
    for steps, ratios in sorted(student.items()):
        for rule, limits in gates.limits.items():
            limit = limits.get(steps) if isinstance(limits, dict) else limits
            if limit is None or (rule == "alignment_forgotten" and not forgets):
                continue
            figure, _, network = rule.partition(".")
            source = ratios.networks.get(network) if network else ratios
            value = (latency_ms or {}).get(steps) if rule == "latency_ms" else getattr(source, figure, None)
            interval = source.fd_ratio_ci if source is not None and figure == "fd_ratio" else None
            results.append(_result(rule, steps, value, limit, at_most=_AT_MOST[figure], interval=interval))
    return Verdict(tuple(results), tuple(sorted(student)))


def _result(
    rule: str, steps: int, value: float | None, limit: float, *, at_most: bool, interval: tuple[float, float] | None
) -> GateResult:
    if value is None or not math.isfinite(value):
        return GateResult(rule, steps, None, limit, at_most, False, interval)
    return GateResult(rule, steps, value, limit, at_most, value <= limit if at_most else value >= limit, interval)
