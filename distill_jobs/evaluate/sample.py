"""What is kept of a generator's pictures: features, attributes found and three pixel figures, never the pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from distill_jobs.evaluate import grain
from distill_jobs.evaluate.clipping import clipped
from distill_jobs.evaluate.features import FeatureNetwork
from distill_jobs.evaluate.pixels import Pixels
from engines.errors import Diverged, InvalidRequest


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen in N pictures."""

    features: npt.NDArray[np.float32]  # [N, D]
    attributes: npt.NDArray[np.int64]  # [N, A], as the feature network reads them
    grain: float
    saturation: float
    clipped: float | None  # None: an older file of answers does not say

    @property
    def n(self) -> int:
        return len(self.features)

    def part(self, index: npt.NDArray[np.int64]) -> Sample:
        """The pictures at `index` [M]; grain, saturation and clipping stay those of all."""
        return replace(self, features=self.features[index], attributes=self.attributes[index])


class Tally:
    """Collects a `Sample` from pictures that come in batches."""

    def __init__(self, network: FeatureNetwork) -> None:
        self._network = network
        self._features: list[npt.NDArray[np.float32]] = []
        self._attributes: list[npt.NDArray[np.int64]] = []
        self._grain = grain.GrainTally()
        self._saturation = self._clipped = 0.0

    def add(self, pixels: Pixels) -> None:
        """Looks at one batch of pictures.

        Raises:
            Diverged: a picture holds values that are no numbers.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InvalidRequest(f"a sampler returns pictures [N, 3, H, W], not {pixels.shape}")
        if pixels.dtype != np.uint8 and not np.isfinite(pixels).all():
            raise Diverged("the sampler made pictures with values that are no numbers; the weights are unusable")
        seen = self._network.observe(pixels)
        self._features.append(seen.features)
        self._attributes.append(seen.attributes)
        self._grain.add(pixels)
        self._saturation += grain.saturation(pixels) * len(pixels)
        self._clipped += clipped(pixels) * len(pixels)

    def sample(self) -> Sample:
        features = np.concatenate(self._features)
        saturation, share = self._saturation / len(features), self._clipped / len(features)
        return Sample(features, np.concatenate(self._attributes), self._grain.mean(), saturation, share)


def of(pixels: Pixels, network: FeatureNetwork) -> Sample:
    """The `Sample` of pictures that are already there."""
    tally = Tally(network)
    tally.add(pixels)
    return tally.sample()
