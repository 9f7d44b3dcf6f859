"""What a student's videos are: how many frames of how many latents, shown how fast. Torch-free, as the manifest is."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.errors import InvalidRequest

MAX_FPS = 60


class Frames(BaseModel):
    """The time axis of one student. The first latent is a frame of its own, each further one `per_latent` frames."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=2, description="frames of a video")
    per_latent: int = Field(ge=1, description="frames per latent position in time, after the first")
    fps: int = Field(ge=1, le=MAX_FPS, description="frames a second, where a request does not say")

    @model_validator(mode="after")
    def _whole(self) -> "Frames":
        if (self.number - 1) % self.per_latent:
            raise ValueError(f"number must be 1 + a multiple of {self.per_latent}, not {self.number}")
        return self

    @property
    def latents(self) -> int:
        """Latent positions in time."""
        return 1 + (self.number - 1) // self.per_latent


def of(own: Frames | None, number: int | None) -> Frames | None:
    """The frames of a student of a pipeline that makes `own`, asked for `number`; None for single pictures.

    Raises:
        InvalidRequest: the pipeline makes none, or its VAE no such number.
    """
    if number is None or number == 1:
        return own if number is None else None
    if own is None:
        raise InvalidRequest(
            f"num_frames={number}: the pipeline makes single pictures, leave it out", param="num_frames"
        )
    if number < 1 or (number - 1) % own.per_latent:
        below = max(0, (number - 1) // own.per_latent) * own.per_latent + 1
        raise InvalidRequest(
            f"num_frames={number}: the VAE makes 1 frame and then {own.per_latent} at a time, so give {below} or "
            f"{below + own.per_latent}",
            param="num_frames",
        )
    return Frames.model_validate(own.model_dump() | {"number": number})
