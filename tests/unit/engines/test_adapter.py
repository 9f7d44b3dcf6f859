"""How strong a LoRA is, where peft itself wrote it: its config stands in a file of its own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines import adapter
from engines.errors import InvalidManifest, NotBuilt

WEIGHTS = {"layer.weight": torch.zeros(3, 5)}


def written(folder: Path, config: str | None) -> tuple[Path, Tensor]:
    """peft's folder with a LoRA of rank 2, and its B A."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator)
    file = folder / "adapter_model.safetensors"
    stem = "base_model.model.layer"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, file)
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    return file, b @ a


@pytest.mark.parametrize(("config", "strength"), [(None, 1.0), ({"r": 2, "lora_alpha": 8}, 4.0), ({"r": 2}, 1.0)])
def test_a_lora_that_peft_wrote_is_as_strong_as_its_config_says(
    config: dict[str, int] | None, strength: float, tmp_path: Path
) -> None:
    file, product = written(tmp_path, None if config is None else json.dumps(config))
    merged = adapter.read(file, WEIGHTS).merged(WEIGHTS)["layer.weight"]
    torch.testing.assert_close(merged, strength * product)


def test_what_peft_scales_otherwise_is_refused(tmp_path: Path) -> None:
    file, _ = written(tmp_path, json.dumps({"lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(NotBuilt, match="use_rslora"):
        adapter.read(file, WEIGHTS)


@pytest.mark.parametrize("config", ["{", "[1]", ""])
def test_a_config_that_cannot_be_read_is_refused_and_not_guessed(config: str, tmp_path: Path) -> None:
    file, _ = written(tmp_path, config)
    with pytest.raises(InvalidManifest, match=r"adapter_config\.json"):
        adapter.read(file, WEIGHTS)


STEM = "base_model.model.layer"
A, B, ALPHA = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight", f"{STEM}.alpha"
WHOLE = {A: torch.ones(2, 5), B: torch.ones(3, 2)}
ALPHA_OF_PEFT = json.dumps({"unet.lora_alpha": "8"})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({ALPHA: torch.ones(2)}, [ALPHA, "[1.0, 1.0]", "one finite number"]),
        ({ALPHA: torch.tensor(float("nan"))}, [ALPHA, "nan", "one finite number"]),
        ({B: torch.ones(3)}, [B, "(3,)", "a matrix"]),
        ({A: torch.ones(())}, [A, "()", "a matrix"]),
        ({A: torch.ones(0, 5), B: torch.ones(3, 0)}, [A, "(0, 5)", "a matrix"]),
        ({B: torch.ones(3, 4)}, [A, B, "of rank 2", "of 4"]),
        ({B: torch.ones(3, 2, 3, 3)}, [A, B, "of rank 2", "of 18"]),
        ({"unet.layer.lora_A.weight": torch.ones(2, 5)}, [A, "unet.layer.lora_A.weight", "one layer, layer"]),
    ],
)
def test_what_belongs_to_no_lora_is_refused_by_name(
    changed: dict[str, Tensor], told: list[str], tmp_path: Path
) -> None:
    save_file(WHOLE | changed, tmp_path / "lora.safetensors")
    with pytest.raises(InvalidManifest, match="save the LoRA again") as refused:
        adapter.read(tmp_path / "lora.safetensors", WEIGHTS)
    assert [part for part in told if part not in refused.value.message] == []


@pytest.mark.parametrize("alpha", ["8", None, True, [8]])
def test_an_alpha_in_a_config_that_is_no_number_is_refused(alpha: object, tmp_path: Path) -> None:
    file, _ = written(tmp_path, json.dumps({"lora_alpha": alpha}))
    with pytest.raises(InvalidManifest, match=r"lora_alpha of the LoRA is .* one finite number"):
        adapter.read(file, WEIGHTS)


def test_an_alpha_in_the_file_s_metadata_that_is_no_number_is_refused(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "lora.safetensors", {"lora_adapter_metadata": ALPHA_OF_PEFT})
    with pytest.raises(InvalidManifest, match="lora_alpha of the LoRA is '8'"):
        adapter.read(tmp_path / "lora.safetensors", WEIGHTS)
