"""The part of a family that is the same for all: three engines, guided rows, and pictures out of latents."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from engines.backends.base import Engine
from engines.errors import InvalidRequest
from engines.families._text import load_tokenizers, read_prompts
from engines.families.base import GREY, SEEN, ReadFile, Tokens
from engines.noising import over


class TextToImage:
    """A text-to-image pipeline without its scheduler. A family file says what differs.

    `lengths`: the tokens that each tokenizer gives a prompt; None is the tokenizer's own maximum.
    """

    lengths: ClassVar[tuple[int | None, ...]] = (None,)

    def __init__(
        self,
        encoder: Engine,
        denoiser: Engine | Mapping[str, Engine],
        decoder: Engine,
        *,
        tokenizer: Any = None,
        inputs: frozenset[str] = frozenset(),
        pictures: Callable[[], Engine] | None = None,
        downscale: int = 1,
    ) -> None:
        self.encoder, self.decoder, self._pictures = encoder, decoder, pictures
        self.denoisers = denoiser if isinstance(denoiser, Mapping) else {"denoiser": denoiser}
        self.inputs = inputs
        self._tokenizers = tokenizer
        self._null: Tensor | None = None
        self._downscale = downscale
        self._open: Tensor | None = None

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        return read_prompts(self._tokenizers, [self.worded(prompt) for prompt in prompts], self.lengths)

    def worded(self, prompt: str) -> str:
        """The prompt as the tokenizers are given it."""
        return prompt

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.embed(self.tokenize(prompts))

    def embed(self, tokens: Tokens) -> Tensor:
        mask = tokens.mask if "mask" in self.encoder.inputs else None
        return self.encoder.run(**_present(ids=tokens.ids, mask=mask))["cond"]

    def null(self) -> Tensor:
        """What guided rows are guided away from where no other prompt is given: [1, L, D]."""
        if self._null is None:
            self._null = self.encode([""])
        return self._null

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor,
        s: Tensor | None = None,
        w: Sequence[float | None] | Tensor | None = None,
        *,
        negative: Tensor | None = None,
        net: str = "denoiser",
        seen: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        engine = self.denoisers[net]
        shown = self._shown(x, seen) if SEEN in engine.inputs else None
        weights = _as_weights(w, len(x))
        if "w" in self.inputs:
            read = torch.full((len(x),), torch.nan) if weights is None else weights
            given = _present(x=x, t=t, cond=cond, s=self._second(t, s), w=read, seen=shown)
            return engine.run(**given)["pred"].to(x.device)
        if weights is None:
            return engine.run(**_present(x=x, t=t, cond=cond, s=self._second(t, s), seen=shown))["pred"].to(x.device)
        guided = (~weights.isnan()).nonzero().flatten()
        null = self.null() if negative is None else negative
        rows = torch.cat([torch.arange(len(x)), guided])
        second = self._second(t, s)
        pred = engine.run(
            **_present(
                x=x[rows],
                t=t[rows],
                cond=torch.cat([cond, null.expand_as(cond)[guided]]),
                s=None if second is None else second[rows],
                seen=None if shown is None else shown[rows],
            )
        )["pred"].to(x.device)
        c, u = pred[: len(x)], pred[len(x) :]
        c[guided] = self.guided(c[guided], u, over(weights[guided], x).to(x.device))
        return c

    def guided(self, c: Tensor, u: Tensor, w: Tensor) -> Tensor:
        """One guided prediction out of two. c, u as x; w [B, 1, ...]."""
        return u + w * (c - u)

    @property
    def sees(self) -> bool:
        return any(SEEN in engine.inputs for engine in self.denoisers.values())

    def _shown(self, x: Tensor, seen: Sequence[Tensor | None] | None) -> Tensor:
        """[B, 1 + C, H, W]. What may change everywhere is a grey picture under a mask of ones, as in diffusers."""
        given = [None] * len(x) if seen is None else seen
        if self._open is None and any(one is None for one in given):
            height, width = (self._downscale * side for side in x.shape[-2:])
            grey, _ = self.look(torch.full((1, 3, height, width), GREY))
            self._open = torch.cat([torch.ones_like(grey[0, :1]), grey[0]])
        return torch.stack([cast(Tensor, self._open if one is None else one).to(x.device) for one in given])

    def look(self, levels: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._pictures is None:
            raise InvalidRequest("this student was loaded without what encodes pictures", param="image")
        made = self._pictures().run(levels=levels)
        if "latents" in made:
            return made["latents"], None
        latents, deviation = made["codes"].chunk(2, dim=1)
        return latents, deviation

    def decode(self, latents: Tensor) -> Tensor:
        return self.levels(latents).round().to(torch.uint8)

    def levels(self, latents: Tensor) -> Tensor:
        return self.decoder.run(latents=latents)["levels"]

    def network_rows(self, w: float | None) -> int:
        return 1 if w is None or "w" in self.inputs else 2

    def _second(self, t: Tensor, s: Tensor | None) -> Tensor | None:
        if "s" not in self.inputs:
            return None
        return t if s is None else s

    @staticmethod
    def sigmas(steps: int) -> list[float] | None:
        """The noise levels that the pipeline asks its flow scheduler for; None leaves them to the scheduler."""
        return None

    @staticmethod
    def tokenizer(read: ReadFile, names: Sequence[str]) -> Any:
        return load_tokenizers(read, names)


def _as_weights(w: Sequence[float | None] | Tensor | None, rows: int) -> Tensor | None:
    """[B] fp32 in the host's memory, NaN where a row is not guided; None where no row is."""
    if isinstance(w, Tensor):
        weights = w.to("cpu", torch.float32).expand(rows)
        return None if bool(weights.isnan().all()) else weights
    if w is None or all(v is None for v in w):  # no tensors: between two calls every small operation counts
        return None
    return torch.tensor([float("nan") if v is None else v for v in w], dtype=torch.float32)


def _present(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if value is not None}
