"""What a job may say of the student that it makes. Torch-free, as the spec is that it is part of."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill_jobs import forgetting
from distill_jobs.forgetting import Forget
from engines.manifest import Name

Steps = Annotated[int, Field(ge=1, le=64)]
Weight = Annotated[float, Field(ge=0, le=30)]
Level = Annotated[float, Field(gt=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSpec(_Frozen):
    rank: int = Field(32, ge=1, le=1024)
    alpha: float | None = Field(None, gt=0, description="the update is alpha / rank times B A; the rank if missing")
    targets: Literal["auto"] | tuple[str, ...] = Field(
        "auto", min_length=1, description="ends of layer names such as to_q; auto is every linear and convolution"
    )

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoraTrain(_Frozen):
    lora: LoraSpec


class SlimSpec(_Frozen):
    """Fewer layers than the teacher has: the stage `slimming` teaches them, a few-step method follows."""

    layers: int | None = Field(
        None, ge=1, description="of each block of a UNet, or blocks of a transformer; all if missing"
    )
    middle: bool = Field(True, description="false leaves a UNet's middle block out")

    @model_validator(mode="after")
    def _smaller(self) -> Self:
        if self.layers is None and self.middle:
            raise ValueError("slim leaves nothing out: say layers, or middle: false")
        return self


class EmbeddedGuidance(_Frozen):
    embedded: tuple[Weight, Weight] = Field(description="least and greatest weight of u + w(c - u) that it learns")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.embedded[0] >= self.embedded[1]:
            raise ValueError(f"embedded needs a least and a greater weight, not {self.embedded}")
        return self


class StudentSpec(_Frozen):
    name: Name
    steps: tuple[Steps, ...] = Field((1, 2, 4), min_length=1, max_length=8)
    train: Literal["full"] | LoraTrain = "full"
    guidance: Literal["baked"] | EmbeddedGuidance = Field(
        "baked", description="the teacher's weight in the network's own, or a range of weights that the network reads"
    )
    slim: SlimSpec | None = Field(None, description="which of the teacher's layers the student is left with")
    quantise: Literal["int8", "int4"] | None = Field(
        None, description="weights of repeated blocks are trained and stored as multiples of a scale per output channel"
    )
    experts: tuple[Level, ...] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="falling noise levels (1 is pure noise); at each of them, and below, a further network takes over",
    )
    forget: tuple[Forget, ...] | None = Field(
        None, min_length=1, max_length=64, description="what it shall not draw, and what it draws instead"
    )

    @property
    def weights(self) -> tuple[float, float] | None:
        """The range of guidance weights that the network reads; None where one is baked in."""
        return None if self.guidance == "baked" else self.guidance.embedded

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.steps)) != len(self.steps):
            raise ValueError(f"steps names a count twice: {self.steps}")
        return self

    @model_validator(mode="after")
    def _slim_is_full(self) -> Self:
        if self.slim is not None and self.train != "full":
            raise ValueError("slim changes the network, and a LoRA is beside the teacher's own: train full")
        return self

    @model_validator(mode="after")
    def _quantised_is_full(self) -> Self:
        if self.quantise is not None and self.train != "full":
            raise ValueError("quantise rounds the network's weights, and a LoRA is added to its teacher's: train full")
        return self

    @model_validator(mode="after")
    def _experts_are_full(self) -> Self:
        if self.experts is None:
            return self
        if any(low >= high for high, low in pairwise(self.experts)):
            raise ValueError(f"experts needs falling noise levels, not {self.experts}")
        if self.train != "full":
            raise ValueError("experts are networks of their own, and a LoRA is beside its teacher's: train full")
        if self.quantise is not None:
            raise ValueError("quantise rounds the weights of one network: leave it out, or experts")
        return self

    @model_validator(mode="after")
    def _forgets_one_thing_each(self) -> Self:
        forgetting.check(self.forgets)
        return self

    @property
    def weight_bits(self) -> Literal[4, 8] | None:
        """Of the grid that weights are on; None where they are on none."""
        return None if self.quantise is None else 8 if self.quantise == "int8" else 4

    @property
    def forgets(self) -> tuple[Forget, ...]:
        return self.forget or ()

    @property
    def lora(self) -> LoraSpec | None:
        """The adapter that is trained; None where all weights are."""
        return None if self.train == "full" else self.train.lora
