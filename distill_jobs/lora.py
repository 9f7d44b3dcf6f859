"""LoRA: a network that trains two small matrices beside each of its layers and shares all else with its teacher.

An adapted network is a tree of modules of its own whose backbone parameters are the very tensors of the network it
was made from. So any number of roles costs one backbone, the teacher is that network untouched, and nothing is ever
switched: a role's training mode, dropout and gradients are its own, whichever role was asked before.

Source: LoRA, arXiv 2106.09685, §4.1: W + (alpha / rank) B A with B = 0 at the start. The layers are peft's.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.student_spec import LoraSpec
from engines import adapter
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest

_A, _B, _NAME = ".lora_A.", ".lora_B.", "default"  # as peft names them: <layer>.lora_A.<adapter>.weight
_SEED = 0


class Adapted(Denoiser):
    """A denoiser whose parameters and state are those of its adapter alone; the backbone is somebody else's.

    A copy has an adapter of its own and the same backbone.
    """

    def __init__(self, net: nn.Module, like: Denoiser, lora: LoraSpec) -> None:
        super().__init__(net, like.process, like.kind, like.inputs)
        self.lora = lora
        self.register_state_dict_post_hook(_adapter_only)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_without_backbone)  # type: ignore[no-untyped-call]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        everything = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, parameter) for name, parameter in everything if _is_adapter(name))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapted":
        copied = Adapted(_sharing(_module(self), memo), self, self.lora)
        copied.training = self.training
        return copied


def adapted(denoiser: Denoiser, lora: LoraSpec) -> Adapted:
    """The same function as `denoiser`, bit by bit, until its adapter is trained. Freezes the shared backbone.

    A is drawn the same for every role, so that averages of two roles' adapters mean something.

    Raises:
        InvalidRequest: a target is no layer that can be adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and most students are whole networks

    net = _sharing(_module(denoiser), {})
    exactly = "|".join(map(re.escape, layers(denoiser, lora)))  # a list would mean ends of names, and match more
    config = LoraConfig(r=lora.rank, lora_alpha=lora.factor * lora.rank, target_modules=exactly)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        inject_adapter_in_model(config, net, _NAME)
    return Adapted(net, denoiser, lora)


def layers(denoiser: Denoiser, lora: LoraSpec) -> list[str]:
    """Names of the layers that get an adapter: every linear and convolution, or those that a target ends the name of.

    Raises:
        InvalidRequest: a target ends the name of none.
    """
    able = [name for name, layer in _module(denoiser).named_modules() if _is_able(layer)]
    if lora.targets == "auto":
        return able
    chosen = {target: [name for name in able if f".{name}".endswith(f".{target}")] for target in lora.targets}
    if lost := [target for target, found in chosen.items() if not found]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in able}))
        raise InvalidRequest(
            f"student.train.lora.targets names {', '.join(lost)}, which ends the name of no linear layer or "
            f"convolution of this teacher: say auto, or choose from {known}",
            param="student.train.lora.targets",
        )
    return sorted({name for found in chosen.values() for name in found})


def merged(backbone: Mapping[str, Tensor], trained: Mapping[str, Tensor], lora: LoraSpec) -> dict[str, Tensor]:
    """The full weights of an adapted network under the names of its backbone: W + (alpha / rank) B A."""
    return adapter.merged(backbone, {stem: (a, lora.factor * b) for stem, (a, b) in _pairs(trained).items()})


def portable(trained: Mapping[str, Tensor], lora: LoraSpec) -> dict[str, Tensor]:
    """An adapter under peft's names in files: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.

    alpha / rank is multiplied into B, so that a loader which takes alpha for the rank, as all do where nothing else
    is said, has the same network.
    """
    scaled = {name: lora.factor * value if _B in name else value for name, value in trained.items()}
    return {name.replace(f".{_NAME}.", "."): value.contiguous() for name, value in scaled.items()}


def _pairs(trained: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A [rank, in, ...], B [out, rank, ...])."""
    return {
        name.partition(_A)[0]: (value, trained[name.replace(_A, _B)]) for name, value in trained.items() if _A in name
    }


def _sharing(net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of the modules around the same backbone parameters; those of an adapter are copied."""
    memo |= {id(p): p for name, p in net.named_parameters() if not _is_adapter(name)}
    return copy.deepcopy(net, memo)


def _module(denoiser: Denoiser) -> nn.Module:
    net = denoiser.net
    if not isinstance(net, nn.Module):
        raise TypeError(f"a {type(net).__name__} is no module, so it cannot be adapted")
    return net


def _is_able(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _is_adapter(name: str) -> bool:
    return _A in name or _B in name


def _adapter_only(_: nn.Module, state: dict[str, Tensor], prefix: str, __: object) -> None:
    for name in [n for n in state if n.startswith(prefix) and not _is_adapter(n)]:
        del state[name]


def _without_backbone(_: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if _is_adapter(name)]
