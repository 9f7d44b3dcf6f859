"""The algebra of every process, checked against itself and against finite differences."""

import math
from typing import Literal, get_args

import pytest
import torch

from engines.manifest import Betas, Kind, ProcessSpec
from engines.process import DDPM, EDM, RF, TRIG, VP, Process, Shifted, make, over, rebase

PROCESSES: dict[str, Process] = {
    "rf": RF(),
    "vp-cosine": VP(),
    "vp-linear": VP(curve="linear"),
    "edm": EDM(),
    "trig": TRIG(sigma_data=0.7),
    "ddpm": DDPM(Betas(steps=1001)),  # the times of the tests lie between its steps, where it is smooth
    "ddpm-cosine": DDPM(Betas(curve="squaredcos_cap_v2", steps=1001)),
    "rf-shifted": Shifted(RF(), 3.0),
    "edm-shifted": Shifted(EDM(sigma_max=20.0), 0.5),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def some_times(process: Process) -> torch.Tensor:
    return torch.tensor([0.03, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64) * min(process.t_max, 3.0)


def a_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return x0, eps


@every_process
@pytest.mark.parametrize("kind", get_args(Kind))
def test_split_undoes_join_for_every_kind(process: Process, kind: str) -> None:
    (x0, eps), t = a_pair(), some_times(process)
    got_x0, got_eps = process.split(process.join(x0, eps, kind, t), kind, process.mix(x0, eps, t), t)
    torch.testing.assert_close(got_x0, x0)
    torch.testing.assert_close(got_eps, eps)


@every_process
def test_velocity_is_the_time_derivative_of_mix(process: Process) -> None:
    (x0, eps), t, h = a_pair(), some_times(process), 1e-6
    measured = (process.mix(x0, eps, t + h) - process.mix(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(process.velocity(x0, eps, t), measured, atol=1e-7, rtol=1e-6)


@every_process
def test_t_of_angle_undoes_angle(process: Process) -> None:
    t = some_times(process)
    torch.testing.assert_close(process.t_of_angle(process.angle(t)), t)


@every_process
def test_time_zero_is_data_and_time_rises_towards_noise(process: Process) -> None:
    angles = process.angle(torch.linspace(0, process.t_max, 20, dtype=torch.float64))
    assert angles[0] == pytest.approx(0, abs=1e-9)
    assert (angles.diff() > 0).all()
    assert angles[-1] > 1.38  # at most a fifth of the end is signal


@pytest.mark.parametrize("src", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("dst", [RF(), VP(curve="linear"), EDM(), TRIG()], ids=["rf", "vp", "edm", "trig"])
def test_rebase_is_mix_at_the_other_process(src: Process, dst: Process) -> None:
    (x0, eps), t = a_pair(), some_times(src)
    x, t_dst = rebase(src.mix(x0, eps, t), t, src, dst)
    torch.testing.assert_close(x, dst.mix(x0, eps, t_dst))


def test_a_shift_moves_time_towards_noise_and_keeps_the_networks_own_time() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(Shifted(RF(), 3.0).sigma(t), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(Shifted(RF(), 3.0).network_time(t), torch.tensor([0.0, 0.75, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_process
@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_very_ends_stay_finite(process: Process, kind: str, dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, 1e-5, process.t_max * (1 - 1e-5), process.t_max], dtype=dtype)
    x0, eps = (part[:4].to(dtype) for part in a_pair())
    x = process.mix(x0, eps, t)
    for part in process.split(process.join(x0, eps, kind, t), kind, x, t):
        assert part.isfinite().all()


def test_score_is_minus_eps_over_sigma() -> None:
    x0, eps = a_pair()
    t = torch.full((5,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(VP().score(x0, eps, t), -eps / math.sin(math.pi / 4))


def test_a_manifest_names_its_process() -> None:
    assert make(ProcessSpec()) == RF()
    assert make(ProcessSpec(kind="rf", shift=3.0)) == Shifted(RF(), 3.0)
    assert make(ProcessSpec(kind="trig", sigma_data=0.5)) == TRIG(sigma_data=0.5)
    assert make(ProcessSpec(kind="edm", sigma_data=0.5)) == EDM(sigma_data=0.5, sigma_max=80.0)
    assert make(ProcessSpec(kind="edm", sigma_data=1.0, sigma_max=120.0)) == EDM(sigma_data=1.0, sigma_max=120.0)


@pytest.mark.parametrize("curve", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_chain_has_the_noise_of_diffusers_and_its_network_the_step_s_own_number(curve: Literal["linear"]) -> None:
    from diffusers import DDPMScheduler

    bars = DDPMScheduler(beta_schedule=curve, beta_start=0.001, beta_end=0.02).alphas_cumprod.double()
    process, steps = DDPM(Betas(curve=curve, start=0.001, end=0.02)), torch.arange(1000, dtype=torch.float64)
    t = (steps + 1) / 1000
    torch.testing.assert_close(process.alpha(t).square(), bars, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(process.sigma(t).square(), 1 - bars, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(1000 * process.network_time(t), steps)
    assert process.prior(t).eq(1).all()


def test_a_network_of_edm_is_preconditioned_as_in_table_1() -> None:
    process, (x0, eps) = EDM(sigma_data=0.5), a_pair()
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    x, F = process.mix(x0, eps, sigma), eps
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    c_in, c_noise = 1 / (sigma**2 + 0.25).sqrt(), sigma.log() / 4
    torch.testing.assert_close(process.network_scale(sigma), c_in)
    torch.testing.assert_close(1000 * process.network_time(sigma), c_noise)
    torch.testing.assert_close(process.split(F, "edm", x, sigma)[0], over(c_skip, x) * x + over(c_out, x) * F)
    torch.testing.assert_close(process.split(F, "v", x, sigma)[0], over(c_skip, x) * x - over(c_out, x) * F)
    assert process.network_time(torch.zeros(1)).isfinite().all()


def test_edm_s_v_is_that_of_the_variance_preserving_process_with_the_same_noise_to_signal() -> None:
    for process in (EDM(sigma_data=1.0), Shifted(EDM(sigma_data=1.0), 0.5)):
        t = some_times(process)
        angle = process.angle(t)
        a, b = process.row("v", t)
        torch.testing.assert_close(a, -angle.sin())
        torch.testing.assert_close(b, angle.cos())


@every_process
def test_bending_time_leaves_the_data_as_they_are(process: Process) -> None:
    assert Shifted(process, 2.0).sigma_data == process.sigma_data
    t = some_times(process)
    sigma, signal = process.sigma(t), process.sigma_data * process.alpha(t)
    torch.testing.assert_close(process.row("edm", t)[1], -signal / torch.hypot(sigma, signal))


def test_ticks_round_the_network_s_time_down_and_let_derivatives_through() -> None:
    process = make(ProcessSpec(ticks=1000))
    t = torch.tensor([0.9379, 0.5], dtype=torch.float64, requires_grad=True)
    told = process.network_time(t)
    torch.testing.assert_close(told, torch.tensor([0.937, 0.5], dtype=torch.float64))
    (slope,) = torch.autograd.grad(told.sum(), t)
    assert slope.eq(1).all()


def test_what_a_process_lacks_is_not_in_its_manifest() -> None:
    assert set(ProcessSpec().model_dump()) == {"kind", "shift", "sigma_data"}
    spec = ProcessSpec(kind="ddpm", betas=Betas())
    assert ProcessSpec.model_validate(spec.model_dump()) == spec
    for wrong in ({"kind": "ddpm"}, {"betas": {}}, {"kind": "vp", "ticks": 1000}, {"sigma_max": 80.0}):
        with pytest.raises(ValueError, match=r"betas|ticks|sigma_max"):
            ProcessSpec.model_validate(wrong)
