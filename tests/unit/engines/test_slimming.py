"""A smaller network is of the same library class, and its weights are the larger one's."""

import copy
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from engines.errors import InvalidRequest
from engines.slimming import slimmed


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=3,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def transformer() -> Any:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=5, sample_size=8,
        cross_attention_dim=8, caption_channels=8, norm_num_groups=2, patch_size=2, use_additional_conditions=False,
    ).eval()  # fmt: skip


def smaller(network: Any, **cut: Any) -> Any:
    found = slimmed(dict(network.config), **cut)
    made = type(network).from_config(found.config)
    renamed = {new: value for name, value in network.state_dict().items() if (new := found.rename(name))}
    made.load_state_dict(renamed)  # strict: nothing is missing, nothing too much, every shape fits
    return made.eval()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("middle", [True, False])
def test_a_unet_with_fewer_layers_loads_its_teachers_weights_and_runs(layers: int, middle: bool) -> None:
    teacher = unet()
    student = smaller(teacher, layers=layers, middle=middle)
    assert [len(block.resnets) for block in student.down_blocks] == [layers, layers]
    assert [len(block.resnets) for block in student.up_blocks] == [layers + 1, layers + 1]
    assert (student.mid_block is None) == (not middle)
    out = student(torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.randn(2, 3, 8)).sample
    assert out.shape == (2, 4, 8, 8)
    last = teacher.up_blocks[1].resnets[3].conv1.weight
    torch.testing.assert_close(student.up_blocks[1].resnets[layers].conv1.weight, last)


def test_a_unet_with_all_of_its_layers_is_unchanged() -> None:
    teacher = unet()
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.randn(2, 3, 8)
    torch.testing.assert_close(smaller(teacher, layers=3)(x, t, cond).sample, teacher(x, t, cond).sample)


def test_a_transformer_without_blocks_that_do_nothing_computes_the_same() -> None:
    teacher = transformer()
    for at in (1, 3):  # of 5 blocks three stay: 0, 2 and 4
        for layer in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"):
            linear = teacher.transformer_blocks[at].get_submodule(layer)
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    student = smaller(teacher, layers=3)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.randn(2, 3, 8)
    added = {"resolution": None, "aspect_ratio": None}
    ours, theirs = (m(x, cond, t, added_cond_kwargs=added).sample for m in (student, teacher))
    torch.testing.assert_close(ours, theirs)
    wrong = smaller(copy.deepcopy(teacher), layers=2)  # 0 and 4: block 2 did something
    assert not torch.allclose(wrong(x, cond, t, added_cond_kwargs=added).sample, theirs)


@pytest.mark.parametrize(
    ("config", "cut", "told"),
    [
        (lambda: dict(unet().config), {"layers": 4}, "layers=4: the teacher has 3"),
        (lambda: dict(unet().config) | {"mid_block_type": None}, {"middle": False}, "no middle"),
        (lambda: dict(unet().config) | {"layers_per_block": (1, 2)}, {"layers": 1}, "different numbers"),
        (lambda: dict(transformer().config), {"middle": False}, "say layers"),
        (lambda: dict(transformer().config), {"layers": 1}, "2 layers or more"),
        (lambda: dict(transformer().config) | {"dual_attention_layers": [0]}, {"layers": 1}, "differ"),
        (lambda: {"_class_name": "Other"}, {"layers": 1}, "a Other cannot be slimmed"),
    ],
)
def test_what_cannot_be_left_out_is_said(config: Any, cut: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        slimmed(config(), **cut)
