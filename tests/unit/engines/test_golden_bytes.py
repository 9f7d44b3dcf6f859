"""The golden samples' bytes stand in a version's digest: the same samples must be the same bytes."""

import torch

from engines.golden import Golden


def golden() -> Golden:
    noise, pictures = torch.randn(2, 4, 2, 2), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    return Golden(("a red circle", "zwei Kreise"), (1000, 1001), (1, 4), noise, pictures)


def test_the_same_samples_are_the_same_bytes() -> None:
    made = golden()
    assert len({made.to_bytes() for _ in range(30)}) == 1


def test_they_are_read_back_as_they_were() -> None:
    made = golden()
    read = Golden.from_bytes(made.to_bytes())
    assert (read.prompts, read.seeds, read.steps) == (made.prompts, made.seeds, made.steps)
    assert torch.equal(read.noise, made.noise)
    assert torch.equal(read.pictures, made.pictures)
