"""What families share of latents: the halves of VAEs as components, and 2 x 2 patches as tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InvalidManifest, InvalidRequest
from engines.families.base import PICTURES, ComponentNetwork, Port

IMAGE_VAES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


class VaeNetwork(ComponentNetwork):
    """One half of a VAE with the pipeline's scaling of latents inside.

    `shifts` and `whitens`: whether the pipeline undoes a shift too, or a mean and deviation per channel.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: Any, *, shifts: bool, whitens: bool) -> None:
        super().__init__()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean, deviation = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        for name, value, undone in (("shift_factor", shift, shifts), ("latents_mean", mean, whitens)):
            if value and not undone:
                raise InvalidManifest(f"vae {name} is set, and the pipeline of this family applies none: remove it")
        self.scale: float = 1.0 / vae.config.scaling_factor
        self.shift: float = shift
        self.whitens = mean is not None and deviation is not None
        if mean is not None and deviation is not None:
            per_channel(self, "mean", mean)
            per_channel(self, "deviation", deviation)

    def coded(self, latents: Tensor) -> Tensor:
        """Latents as the VAE's own decoder reads them."""
        if self.whitens:
            return latents * self.deviation * self.scale + self.mean
        return latents * self.scale + self.shift

    def scaled(self, codes: Tensor, *, shifted: bool = True) -> Tensor:
        """What the VAE's own encoder says as latents; without the shift, how far that spreads."""
        middle: Tensor | float = (self.mean if self.whitens else self.shift) if shifted else 0.0
        unit = self.deviation * self.scale if self.whitens else self.scale
        return (codes - middle) / unit


class DecoderNet(VaeNetwork):
    """latents [B, C, H, W] -> pictures in levels 0..255, fp32 [B, 3, H', W'].

    Not rounded: a grain measure reads what rounding would hide, and rounding costs nothing outside.
    """

    unused = ("encoder.", "quant_conv.")
    outputs = ("levels",)

    def __init__(self, vae: Any, height: int, width: int, *, shifts: bool = False, whitens: bool = False) -> None:
        super().__init__(vae, shifts=shifts, whitens=whitens)
        self.decoder = vae.decoder
        post = getattr(vae, "post_quant_conv", None)
        self.post_quant_conv = post if post is not None else nn.Identity()
        self.ports = (Port("latents", (vae.config.latent_channels, height, width)),)

    def forward(self, latents: Tensor) -> Tensor:
        return levels(self.decoder(self.post_quant_conv(self.coded(latents))))


class PictureEncoderNet(VaeNetwork):
    """levels 0..255, fp32 [B, 3, H', W'] -> latents [B, C, H, W]; of a VAE that draws its codes, `codes` [B, 2C, H, W],
    the latents and their deviations."""

    unused = ("decoder.", "post_quant_conv.")

    def __init__(self, vae: Any, height: int, width: int, *, shifts: bool = False, whitens: bool = False) -> None:
        super().__init__(vae, shifts=shifts, whitens=whitens)
        self.encoder = vae.encoder
        self.draws = hasattr(vae, "quant_conv")  # an AutoencoderKL, with that layer or (None) without
        self.quant_conv = vae.quant_conv if self.draws and vae.quant_conv is not None else nn.Identity()
        self.outputs = ("codes",) if self.draws else ("latents",)
        downscale = image_downscale(vae.config)
        self.ports = (Port("levels", (3, height * downscale, width * downscale)),)

    def forward(self, levels: Tensor) -> Tensor:
        codes = self.quant_conv(self.encoder(levels / 127.5 - 1))
        if not self.draws:
            return self.scaled(codes)
        mean, deviation = posterior(codes)
        return torch.cat([self.scaled(mean), self.scaled(deviation, shifted=False)], dim=1)


class VideoDecoderNet(ComponentNetwork):
    """`DecoderNet` for a video VAE: latents [B, C, T, H, W] -> levels [B, T', 3, H', W'], all frames in one pass.

    Latents [B, C, H, W] are one frame. That passes through none of the layers that make more frames of a latent
    (`time_conv`): they are not read.
    """

    unused = ("encoder.", "quant_conv.")
    outputs = ("levels",)
    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: Any, *size: int) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.single = len(size) == 2
        if self.single:
            of_one_frame(self, vae)
        else:
            in_one_pass(self, vae)
        self.ports = (Port("latents", (vae.config.z_dim, *size)),)

    def select(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _without_time(super().select(weights)) if self.single else super().select(weights)

    def forward(self, latents: Tensor) -> Tensor:
        scaled = latents * self.deviation + self.mean
        frames: Tensor = self.decoder(self.post_quant_conv(scaled.unsqueeze(2) if self.single else scaled))
        return levels(frames[:, :, 0] if self.single else frames.transpose(1, 2))


class VideoPictureEncoderNet(ComponentNetwork):
    """`PictureEncoderNet` for a video VAE: the picture is a video's first frame."""

    unused = ("decoder.", "post_quant_conv.")
    outputs = ("codes",)
    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: Any, height: int, width: int) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        of_one_frame(self, vae)
        downscale = video_downscale(vae.config)
        self.ports = (Port("levels", (3, height * downscale, width * downscale)),)

    def select(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _without_time(super().select(weights))

    def forward(self, levels: Tensor) -> Tensor:
        frame = (levels / 127.5 - 1).unsqueeze(2)
        mean, deviation = posterior(self.quant_conv(self.encoder(frame))[:, :, 0])
        return torch.cat([(mean - self.mean) / self.deviation, deviation / self.deviation], dim=1)


def vae_network(
    role: str, vae: Any, latent: tuple[int, int, int], *, shifts: bool = False, whitens: bool = False
) -> ComponentNetwork:
    """The half of an image VAE that a role (decoder or `PICTURES`) is."""
    half = PictureEncoderNet if role == PICTURES else DecoderNet
    return half(vae, *latent[1:], shifts=shifts, whitens=whitens).eval()


def video_vae_network(role: str, vae: Any, latent: tuple[int, ...]) -> ComponentNetwork:
    """The half of a video VAE that a role (decoder or `PICTURES`) is.

    Raises:
        InvalidManifest: the VAE is of a kind that is not built.
        InvalidRequest: videos are to be encoded, which no family does.
    """
    if getattr(vae.config, "patch_size", None) is not None:
        raise InvalidManifest("a video VAE with patch_size is not built: give one without, as of Wan 2.1")
    if role != PICTURES:
        return VideoDecoderNet(vae, *latent[1:]).eval()
    if len(latent) > 3:
        raise InvalidRequest("this student makes videos, and changes no pictures: leave the picture out", param="image")
    return VideoPictureEncoderNet(vae, *latent[1:]).eval()


def of_one_frame(network: nn.Module, vae: Any) -> None:
    """Takes the layers between frames out of one half of a video VAE, and gives it the scaling of the latents."""
    for module in _between_frames(network):
        del module.time_conv
    per_channel(network, "mean", vae.config.latents_mean)
    per_channel(network, "deviation", vae.config.latents_std)


def in_one_pass(network: nn.Module, vae: Any) -> None:
    """Has a video VAE's decoder make all frames in one pass, and gives it the scaling of the latents.

    diffusers decodes latent by latent and hands on what causal convolutions see of the past, which is what they see in
    one pass; but it makes more frames of a latent only there, and of none before the second. So do these hooks.
    """
    for module in _between_frames(network):
        module.register_forward_pre_hook(_more_frames)
    per_channel(network, "mean", vae.config.latents_mean, axes=3)
    per_channel(network, "deviation", vae.config.latents_std, axes=3)


def _between_frames(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "time_conv")]


def _more_frames(upsample: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Twice as many frames [B, C, T, H, W] out of all but the first, which stays; and what it knows nothing of."""
    first, rest = args[0][:, :, :1], args[0][:, :, 1:]
    pairs = upsample.time_conv(rest).unflatten(1, (2, -1))
    return (torch.cat([first, pairs.movedim(1, 3).flatten(2, 3)], dim=2), *args[1:])


def _without_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the layers that make more frames of a latent, or one of several."""
    return {name: value for name, value in weights.items() if ".time_conv." not in name}


def posterior(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, C, ...] of what a VAE's encoder gives, [B, 2C, ...]."""
    mean, log_variance = codes.chunk(2, dim=1)
    return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))


def per_channel(module: nn.Module, name: str, values: Sequence[float], *, axes: int = 2) -> None:
    """A constant of a network, where the network is: made in a call, it would come from the host each time."""
    module.register_buffer(name, torch.tensor(values).view(-1, *(1,) * axes), persistent=False)


def levels(pictures: Tensor) -> Tensor:
    """-1..1 as 0..255."""
    return (pictures * 127.5 + 127.5).clamp(0, 255)


def image_vae(config: dict[str, Any]) -> Any:
    import diffusers

    return of_class(config, {name: getattr(diffusers, name) for name in IMAGE_VAES}, "decoder")


def of_class(config: dict[str, Any], known: Mapping[str, Any], role: str) -> Any:
    """A diffusers model with random weights from its config.

    Raises:
        InvalidManifest: it is none of `known`.
    """
    name = str(config.get("_class_name"))
    if name not in known:
        raise InvalidManifest(f"the {role} is a {name}: this family has {', '.join(known)}")
    return known[name].from_config(config)


def image_downscale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent position."""
    blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def frames_per_latent(vae: Mapping[str, Any]) -> int:
    return int(2 ** sum(vae["temperal_downsample"]))


def video_downscale(vae: Mapping[str, Any]) -> int:
    return int(2 ** len(vae["temperal_downsample"]))


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C], each token a 2 x 2 patch, channels first."""
    rows, channels, height, width = x.shape
    patches = x.view(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), 4 * channels)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_tokens` for a latent of `height` x `width`."""
    rows, _, size = tokens.shape
    patches = tokens.view(rows, height // 2, width // 2, size // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, size // 4, height, width)
