"""Training with weights on a grid: rounded in every forward pass, so that rounding them for good loses nothing.

That is exact where passes compute in fp32. In bf16 they read every weight with eight significant bits, for which four
bits times a scale of four are few enough and eight bits are not: of normal weights on eight bits a fifth are then read
beside their grid, by .4 % of themselves and less than half a step at most.

Gradients pass as if nothing had been rounded (the straight-through estimator). Optimisers, averages and checkpoints
hold the weights as they are, under the names that they always have; whoever asks the network, trainer or evaluation,
sees it on the grid.

Rounded are the linear layers and convolutions of a network's repeated blocks, which hold nearly all of its weights. The
first and the last layer and the embeddings of time and text are few weights, and what they lose is in everything after
them or in the picture itself; norms and biases are added at full precision by every engine of whole numbers.

Source: straight-through estimator arXiv 1308.3432; training with rounded weights 1712.05877 §3.
Left out: rounded activations; learnt scales; bf16: a cast of everything, in which `train.precision` trains already.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.grid import Bits, rounded, scales_of


def straight_through(weight: Tensor, bits: int) -> Tensor:
    """The weight, in fp32, on its grid to the last bit; its gradient is the weight's own."""
    return rounded(weight, scales_of(weight, bits)) + (weight - weight.detach())


class _Linear(nn.Linear):
    bits: int

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, straight_through(self.weight, self.bits), self.bias)


class _Conv2d(nn.Conv2d):
    bits: int

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, straight_through(self.weight, self.bits), self.bias)
        return out


def quantise(denoiser: Denoiser, bits: Bits) -> Denoiser:
    """Makes the layers of its repeated blocks round their weights, in place: parameters, names and hooks stay.

    Raises:
        InvalidRequest: it has none.
    """
    lists = [module for module in denoiser.modules() if isinstance(module, nn.ModuleList)]
    layers = {layer for blocks in lists for layer in blocks.modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    if not layers:
        raise InvalidRequest(
            "this teacher's network has no repeated blocks, whose layers would be rounded: leave it out",
            param="student.quantise",
        )
    for layer in layers:
        layer.__class__ = _Linear if isinstance(layer, nn.Linear) else _Conv2d
        layer.bits = bits  # type: ignore[assignment]
    return denoiser


@dataclass(frozen=True, slots=True)
class OnGrid:
    """All weights of a network, some of them multiples of their `scales` [out]."""

    weights: dict[str, Tensor]
    scales: dict[str, Tensor]


def on_grid(denoiser: Denoiser, weights: Mapping[str, Tensor]) -> OnGrid:
    """`weights`, such as an average of those of a quantised `denoiser`, as its forward pass would use them."""
    bits = {id(layer.weight): layer.bits for layer in denoiser.modules() if isinstance(layer, _Linear | _Conv2d)}
    own = denoiser.state_dict(keep_vars=True)
    scales = {name: scales_of(weights[name], bits[id(value)]) for name, value in own.items() if id(value) in bits}
    made = {name: rounded(value, scales[name]) if name in scales else value for name, value in weights.items()}
    return OnGrid(made, scales)
