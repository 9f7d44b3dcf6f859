"""Noise by seed and count."""

import torch

from engines.noise import noise


def test_it_is_the_kth_draw_of_the_seeded_cpu_generator() -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    draws = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3)]
    for k, draw in enumerate(draws):
        assert torch.equal(noise(7, k, (4, 8, 8)), draw[0])


def test_it_disturbs_no_other_randomness() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    noise(11, 2, (4,))
    assert torch.equal(torch.randn(4), expected)


def test_the_largest_seed_is_legal() -> None:
    assert noise(2**63 - 1, 0, (1, 2, 2)).dtype == torch.float32
