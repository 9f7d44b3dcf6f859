"""What families share of denoisers: a diffusers transformer as a component, which may read a second time or w too."""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engines.errors import InvalidRequest
from engines.families._text import Packing
from engines.families.base import ComponentNetwork, Port

NETWORK_TIME = 1000.0


class TransformerNet(ComponentNetwork):
    """x [B, C, H, W], t [B], cond [B, R, D], s [B] and w [B] where the student reads them -> prediction.

    Of videos x is [B, C, T, H, W].

    A family says in `predict` how its transformer is asked. The sinusoids of s and w go through a zero-initialised
    layer each and are added to those of t before `embedder`, the layers that read these: a teacher with the layers
    added is still exactly the teacher. A transformer with a guidance input of its own gets w there instead.
    """

    inner = "transformer"
    outputs = ("pred",)
    embedder: ClassVar[str]

    def __init__(
        self,
        transformer: Any,
        packing: Packing,
        latent: tuple[int, ...],
        inputs: Collection[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.packing = packing
        self.own_guidance = bool(transformer.config.get("guidance_embeds"))
        self._extra = _Extra()
        embedder = transformer.get_submodule(self.embedder)
        embedder.register_forward_pre_hook(self._extra)
        self._exact = _Exact()
        transformer.get_submodule(self.embedder.rpartition(".")[0]).register_forward_pre_hook(self._exact)
        width = next(m.in_features for m in embedder.modules() if isinstance(m, nn.Linear))
        self.second_time = zero_linear(width) if "s" in inputs else None
        self.guidance = zero_linear(width) if "w" in inputs and not self.own_guidance else None
        self.ports = (
            Port("x", latent),
            Port("t", ()),
            Port("cond", packing.shape),
            *(Port(name, ()) for name in ("s", "w") if name in inputs),
        )

    def exact(self, t: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
        """The first arguments of the module around `embedder`, where the transformer would round them on their way."""
        return ()

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        """As x, from the unpacked conditioning; w is for a transformer that has an input for it."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        if w is None and (self.guidance is not None or self.own_guidance):
            raise InvalidRequest("this network reads its guidance weight: give w", param="guidance_scale")
        rows = x.shape[0]  # not len(x), which an export takes for a constant
        t, cond = t.expand(rows), cond.expand(rows, -1, -1)  # so that it knows their rows as the same number
        extra = None
        if self.second_time is not None:
            extra = self.second_time(self._sinusoid(NETWORK_TIME * (t if s is None else s)))
        if self.guidance is not None and w is not None:
            added = self.guidance(self._sinusoid(100.0 * w))
            extra = added if extra is None else extra + added
        self._extra.value, self._exact.values = extra, self.exact(t, w)
        try:
            return self.predict(x, t, w, *self.packing.unpack(cond))
        finally:
            self._extra.value, self._exact.values = None, ()

    def _sinusoid(self, value: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_timestep_embedding

        width = next(layer.in_features for layer in (self.second_time, self.guidance) if layer is not None)
        made: Tensor = get_timestep_embedding(value, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return made


class _Extra:
    """Adds `value` to what a layer is given. An object, so that a copy of a network has its own."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self.value is None else (args[0] + self.value, *args[1:])


class _Exact:
    """Gives a module its first arguments as they are. In bf16, 1000 t may be off by 4."""

    def __init__(self) -> None:
        self.values: tuple[Tensor, ...] = ()

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*self.values, *args[len(self.values) :])


def zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def falling(steps: int) -> list[float]:
    """1, ..., 1/K: the noise levels that flow pipelines ask for before the shift."""
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
