"""The picture that a request changes, as its worker has it: what the VAE reads, and what is put back at the end."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.editing import changes_of
from engines.errors import Gone, UnsupportedMessage
from server.brokers.base import Broker
from server.messages import GenerateRequest
from server.uploads import CHANGES_BELOW


@dataclass(frozen=True, slots=True)
class Source:
    """picture uint8 [H, W, 3]; `stays` uint8 [H, W], the share of each pixel that stays, None where all may change."""

    picture: Any
    stays: Any | None

    @classmethod
    def read(cls, data: bytes, width: int, height: int) -> "Source":
        """From what a gateway wrote (`server.uploads`).

        Raises:
            UnsupportedMessage: these are not as many pixels.
        """
        channels, rest = divmod(len(data), width * height)
        if rest or channels not in (3, 4):
            raise UnsupportedMessage(f"{len(data)} bytes are no picture of {width} x {height} pixels")
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, channels)
        return cls(pixels[..., :3], pixels[..., 3] if channels == 4 else None)

    @property
    def levels(self) -> Tensor:
        """fp32 [3, H, W] in 0..255."""
        return torch.from_numpy(self.picture.transpose(2, 0, 1).astype(np.float32))

    @property
    def edited(self) -> Tensor | None:
        """bool [H, W]: what may change; None: everything."""
        return None if self.stays is None else torch.from_numpy(self.stays < CHANGES_BELOW)

    def changes(self, downscale: int) -> Tensor | None:
        """[1, h, w] of the latents: 1 where the picture may change."""
        return None if self.edited is None else changes_of(self.edited, downscale)

    def kept(self, made: Any) -> Any:
        """What was made, uint8 [3, H, W], under what stays of the picture: the VAE moves pixels that no mask opens."""
        if self.stays is None:
            return made
        share = self.stays[None].astype(np.float32) / 255
        return np.rint(made + (self.picture.transpose(2, 0, 1) - made.astype(np.float32)) * share).astype(np.uint8)


async def fetch(broker: Broker, request: GenerateRequest) -> Source:
    """
    Raises:
        Gone: the broker has it no more.
        UnsupportedMessage: it is none.
    """
    data = await broker.source(request.id)
    if data is None:
        raise Gone(f"the picture that {request.id} was to change is gone: send it again")
    return Source.read(data, request.width, request.height)
