"""What a network means, whatever it predicts."""

import pytest
import torch
from torch import Tensor

from engines.denoiser import Denoiser, Guided
from engines.process import EDM, RF, VP, Shifted


class Recorder:
    """A network that predicts cond * x and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, s: Tensor | None, w: Tensor | None) -> Tensor:
        self.asked.append((t, s, w))
        return x if cond is None else x * cond.reshape(-1, 1, 1, 1)


X = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.5, 0.8])


def test_a_network_that_ignores_s_jumps_by_one_ddim_step() -> None:
    den = Denoiser(Recorder(), VP(), "v")
    x0, eps = den(X, T)
    s = torch.tensor([0.1, 0.3])
    torch.testing.assert_close(den.jump(X, T, s), VP().mix(x0, eps, s))
    assert den.net.asked[0][1] is None


def test_a_jump_to_its_own_time_stays_where_it_is() -> None:
    torch.testing.assert_close(Denoiser(Recorder(), RF(), "flow").jump(X, T, T), X)


def test_a_flow_map_is_told_where_to_and_its_velocity_is_asked_at_s_equal_t() -> None:
    den = Denoiser(Recorder(), RF(), "flow", inputs=frozenset({"s"}))
    den.jump(X, T, torch.zeros(2))
    den.velocity(X, T)
    assert torch.equal(den.net.asked[0][1], torch.zeros(2))
    assert torch.equal(den.net.asked[1][1], T)


def test_a_network_that_reads_w_refuses_to_run_without_it() -> None:
    den = Denoiser(Recorder(), RF(), "flow", inputs=frozenset({"w"}))
    with pytest.raises(ValueError, match="guidance weight"):
        den(X, T)
    den(X, T, w=torch.tensor([2.0, 3.0]))
    assert torch.equal(den.net.asked[0][2], torch.tensor([2.0, 3.0]))


def test_a_shifted_process_gives_the_network_its_own_time() -> None:
    den = Denoiser(Recorder(), Shifted(RF(), 3.0), "flow")
    den(X, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(den.net.asked[0][0], torch.tensor([0.75, 1.0]))


def test_a_preconditioned_network_is_given_scaled_x_and_gives_f() -> None:
    den, t = Denoiser(Recorder(), EDM(sigma_data=0.5), "edm"), torch.tensor([0.5, 80.0])
    x0, _ = den(X, t)  # F = c_in x, so that D = (c_skip + c_out c_in) x
    sigma = t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0, X * (0.25 + 0.5 * sigma) / (sigma**2 + 0.25))
    torch.testing.assert_close(den.net.asked[0][0], t.log() / 4000)


def test_guidance_is_u_plus_w_times_c_minus_u() -> None:
    cond, null = torch.tensor([2.0, 3.0]), torch.tensor([0.5])
    den = Denoiser(Recorder(), RF(), "flow")
    v = Guided(den, null, 4.0).velocity(X, T, cond)
    expected = X * (0.5 + 4 * (cond - 0.5)).reshape(2, 1, 1, 1)
    torch.testing.assert_close(v, expected)


def test_outside_its_interval_guidance_is_off() -> None:
    cond, null = torch.tensor([2.0, 2.0]), torch.tensor([0.5])
    v = Guided(Denoiser(Recorder(), RF(), "flow"), null, 4.0, interval=(0.6, 1.0)).velocity(X, T, cond)
    torch.testing.assert_close(v[0], X[0] * 2)
    torch.testing.assert_close(v[1], X[1] * 6.5)


def test_rows_that_are_all_outside_the_interval_ask_the_network_once() -> None:
    net, cond = Recorder(), torch.tensor([2.0, 2.0])
    guided = Guided(Denoiser(net, RF(), "flow"), torch.tensor([0.5]), 4.0, interval=(0.9, 1.0))
    torch.testing.assert_close(guided.velocity(X, torch.tensor([0.3, 0.8]), cond), X * 2)
    assert [len(asked[0]) for asked in net.asked] == [2]


def test_a_weight_given_to_the_call_replaces_the_guides_own() -> None:
    cond, null = torch.tensor([2.0, 2.0]), torch.tensor([0.5])
    v = Guided(Denoiser(Recorder(), RF(), "flow"), null, 9.0).velocity(X, T, cond, w=torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(v[0], X[0] * 2)
    torch.testing.assert_close(v[1], X[1] * 6.5)


def test_guidance_of_one_asks_the_network_once_with_one_row() -> None:
    net = Recorder()
    Guided(Denoiser(net, RF(), "flow"), torch.tensor([0.5]), 1.0)(X, T, torch.tensor([2.0, 2.0]))
    assert [len(asked[0]) for asked in net.asked] == [2]


def test_conditions_may_be_any_pytree() -> None:
    def net(x: Tensor, t: Tensor, cond: dict[str, Tensor], s: object, w: object) -> Tensor:
        return x * cond["scale"].reshape(-1, 1, 1, 1)

    guided = Guided(Denoiser(net, RF(), "flow"), {"scale": torch.tensor([0.5])}, 3.0)
    torch.testing.assert_close(guided.velocity(X, T, {"scale": torch.tensor([2.0, 2.0])}), X * 5)
