"""What a model family is: a diffusers pipeline shape cut into encoder, denoiser and decoder.

A family knows how prompts become conditioning, how a guided row becomes two network rows and which
torch module each component is. It knows no scheduler: solvers own the time axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.backends.base import Engine, check_weights
from engines.frames import Frames

PICTURES = "picture_encoder"
"""The role of what makes latents of pictures: the other half of the decoder's VAE, out of the same blob and config."""

GREY = 127.5
"""The level that VAEs know as 0."""

SEEN = "seen"
"""What a network that inpaints reads beside x: the mask, 1 where the picture may change, and the latents of the picture
that is grey there, [B, 1 + C, H, W]."""

ReadFile = Callable[[str], bytes]
"""Reads one file of a student, `<component>/<file>`: `denoiser/config.json`, `encoder/tokenizer/tokenizer.json`."""


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a component: its name, dtype and shape without the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompts as the encoder reads them. ids and mask [B, L] int64; per prompt the words that it cannot read."""

    ids: Tensor
    ignored_words: tuple[tuple[str, ...], ...]
    counts: tuple[int, ...]
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """The latents of a pipeline: channels, pixels per latent position, its own size in latent positions and, where it
    makes videos, their frames."""

    channels: int
    downscale: int
    height: int
    width: int
    frames: Frames | None = None


class ComponentNetwork(nn.Module):
    """A component as a torch module whose `state_dict()` has the names that stand in its weights blob.

    `inner` is the submodule whose own names the blob uses; names of other children stay as they are.
    `unused` are prefixes of a blob that this component does not read (a decoder's blob holds the whole VAE);
    `ports` are what `forward` takes, in order, and `outputs` name what it returns.
    """

    inner: str | None = None
    unused: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    outputs: tuple[str, ...] = ("out",)

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_drop_inner)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_inner)  # type: ignore[no-untyped-call]

    def graph_names(self) -> dict[str, str]:
        """Weight name in the blob -> name of the parameter in this module."""
        inner = f"{self.inner}." if self.inner else ""
        return {name.removeprefix(inner): name for name in (*dict(self.named_parameters()), *_buffers(self))}

    def select(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a blob that belong to this component, under their names here."""
        return {name: w for name, w in weights.items() if not name.startswith(self.unused)}

    def load(self, weights: Mapping[str, Tensor], *, fresh: tuple[str, ...] = ()) -> None:
        """Loads a whole blob; names that begin with one of `fresh` may be missing and keep what they are.

        Raises:
            GraphMismatch: names are missing or too many, or a shape differs.
        """
        own = self.state_dict()
        kept = {name: value for name, value in own.items() if fresh and name.startswith(fresh)}
        mine = kept | self.select(weights)
        check_weights({name: tuple(value.shape) for name, value in own.items()}, mine)
        self.load_state_dict({name: value.float() for name, value in mine.items()})


class Family(Protocol):
    """Three engines that together make pictures. Rows are independent in every method."""

    def tokenize(self, prompts: Sequence[str]) -> Tokens: ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditioning, one row per prompt: [B, L, D] fp32."""

    def embed(self, tokens: Tokens) -> Tensor:
        """The same of prompts that were read before, for a caller that wants their tokens too."""

    def null(self) -> Tensor:
        """The conditioning [1, L, D] that guided rows are guided away from."""

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
        """The prediction fp32, as x: [B, C, H, W] or, of videos, [B, C, T, H, W].

        A row whose w is neither None nor NaN is guided. `negative` [B, L, D] stands for `null()` where a row has
        another. `seen` is each row's `SEEN` [1 + C, H, W], which most networks do not read; a row without may change
        everywhere.
        """

    @property
    def sees(self) -> bool:
        """Whether its network reads `SEEN`."""

    def look(self, levels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents [B, C, H, W] of pictures in levels 0..255, fp32 [B, 3, H', W'], and how far they spread around that.

        None: the VAE draws no codes, a picture has one.

        Raises:
            InvalidRequest: the VAE's weights lack the half that encodes.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, uint8 [B, 3, H, W], or videos [B, T, 3, H, W]."""

    def levels(self, latents: Tensor) -> Tensor:
        """The same before rounding, fp32 in 0..255: what an evaluation reads."""

    def network_rows(self, w: float | None) -> int:
        """How many rows of a network batch one row with guidance `w` is."""


class FamilyClass(Protocol):
    """What a family file exports as `FAMILY`, beside `PIPELINE`, the class in a directory's model_index.json, and
    `FOLDERS`, the folders of each role. Of several folders, a role's blob holds all weights as `<folder>.<name>`."""

    def __call__(
        self, encoder: Engine, denoiser: Engine | Mapping[str, Engine], decoder: Engine, **options: Any
    ) -> Family: ...

    def configs(self, role: str) -> tuple[str, ...]:
        """The files that `network` reads for a component."""

    def network(
        self, role: str, read: ReadFile, *, inputs: frozenset[str] = ..., latent: tuple[int, ...] = ...
    ) -> ComponentNetwork:
        """The module of one component with random weights, from its config alone.

        `role` is encoder, decoder, `PICTURES` or the name of a denoiser; `latent` is C, H, W of the resolution served,
        and C, T, H, W where videos are.
        """

    def geometry(self, read: ReadFile) -> Geometry:
        """From the configs of denoiser and decoder."""

    def sigmas(self, steps: int) -> list[float] | None:
        """The noise levels that the pipeline asks its flow scheduler for; None leaves them to the scheduler."""

    def tokenizer(self, read: ReadFile, names: Sequence[str]) -> Any:
        """The tokenizer of a student; `names` are the encoder's files."""


def _buffers(module: nn.Module) -> list[str]:
    """Names of persistent buffers: those that a state dict holds."""
    hidden = {f"{p}.{b}" if p else b for p, m in module.named_modules() for b in m._non_persistent_buffers_set}
    return [name for name, _ in module.named_buffers() if name not in hidden]


def _drop_inner(module: ComponentNetwork, state: dict[str, Tensor], prefix: str, _: object) -> None:
    inner = f"{prefix}{module.inner}." if module.inner else ""
    for name in [n for n in state if inner and n.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _add_inner(module: ComponentNetwork, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    own = module.graph_names()
    for name in [n for n in state if n.startswith(prefix)]:
        short = name.removeprefix(prefix)
        state[prefix + own.get(short, short)] = state.pop(name)
