"""What is kept of a generator's pictures: features, attributes found and three pixel figures, never the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from distill_jobs.evaluate import grain
from distill_jobs.evaluate.clipping import clipped
from distill_jobs.evaluate.features import FeatureNetwork, Floats
from distill_jobs.evaluate.networks import DirectoryNetwork
from distill_jobs.evaluate.pixels import Pixels
from engines.errors import Diverged, InvalidRequest


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen in N pictures."""

    features: Floats  # [N, D]
    attributes: npt.NDArray[np.int64]  # [N, A], as the feature network reads them
    grain: float
    saturation: float
    clipped: float | None  # None: an older file of answers does not say
    others: Mapping[str, Floats] = field(default_factory=dict)  # features [N, D'] by the names of further networks

    @property
    def n(self) -> int:
        return len(self.features)

    def part(self, index: npt.NDArray[np.int64]) -> Sample:
        """The pictures at `index` [M]; grain, saturation and clipping stay those of all."""
        others = {name: rows[index] for name, rows in self.others.items()}
        return replace(self, features=self.features[index], attributes=self.attributes[index], others=others)


class Tally:
    """Collects a `Sample` from pictures that come in batches; `others` look at them too."""

    def __init__(self, network: FeatureNetwork, others: Sequence[DirectoryNetwork] = ()) -> None:
        self._network = network
        self._others = others
        self._features: list[Floats] = []
        self._seen: dict[str, list[Floats]] = {network.name: [] for network in others}
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
        for network in self._others:
            self._seen[network.name].append(network.observe(pixels))
        self._grain.add(pixels)
        self._saturation += grain.saturation(pixels) * len(pixels)
        self._clipped += clipped(pixels) * len(pixels)

    def sample(self) -> Sample:
        features = np.concatenate(self._features)
        saturation, share = self._saturation / len(features), self._clipped / len(features)
        others = {name: np.concatenate(rows) for name, rows in self._seen.items()}
        return Sample(features, np.concatenate(self._attributes), self._grain.mean(), saturation, share, others)


def of(pixels: Pixels, network: FeatureNetwork) -> Sample:
    """The `Sample` of pictures that are already there."""
    tally = Tally(network)
    tally.add(pixels)
    return tally.sample()
