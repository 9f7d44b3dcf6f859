"""What people distilled elsewhere makes, imported, the pictures that diffusers makes of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.contract import Sampling
from engines.errors import GraphMismatch, InvalidManifest, InvalidRequest, NotBuilt
from engines.families import wan
from engines.imports import import_student
from engines.loader import load_student
from engines.manifest import StudentManifest
from engines.noise import noise
from engines.registry.memory import MemoryRegistry
from engines.student import sample
from tests import tiny_families

PROMPTS, SEEDS, SIZE, SHAPE = ["a red circle", "two shapes on the left"], [11, 12], 16, (4, 8, 8)
CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of Stable Diffusion's shape whose network predicts the noise, and where it is saved."""
    from diffusers import DDIMScheduler

    made = tiny_families.pipeline("sd")
    made.scheduler = DDIMScheduler(**CHAIN, clip_sample=False, set_alpha_to_one=False)
    made.save_pretrained(tmp_path_factory.mktemp("chain") / "base")
    made.directory = tmp_path_factory.getbasetemp() / "chain0" / "base"
    return made


def ours(registry: MemoryRegistry, version: str, steps: int, guidance: float | None = None) -> Tensor:
    student = load_student(registry, registry.student(version))
    return sample(student, PROMPTS, SEEDS, steps, guidance=guidance, rounded=False) / 255


def theirs(pipeline: Any, monkeypatch: pytest.MonkeyPatch, steps: int, scale: float = 1.0, **asked: Any) -> Tensor:
    """diffusers' pictures from our noise: the first draw as it begins, the others as its scheduler asks for more."""
    drawn = iter(range(1, 100))

    def more(*_: Any, **__: Any) -> Tensor:
        k = next(drawn)
        return torch.stack([noise(seed, k, SHAPE) for seed in SEEDS])

    module = __import__(type(pipeline.scheduler).__module__, fromlist=["x"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", more)
    latents = torch.stack([noise(seed, 0, SHAPE) for seed in SEEDS]) * scale
    told = {"guidance_scale": 1.0, "output_type": "pt"} | asked
    made: Tensor = pipeline(
        list(PROMPTS), height=SIZE, width=SIZE, latents=latents, num_inference_steps=steps, **told
    ).images
    return made


def imported(registry: MemoryRegistry, source: Path, **sampling: Any) -> str:
    return import_student(registry, source, "tiny", sampling=Sampling(**sampling), golden_prompts=PROMPTS[:1]).version


def close(made: Tensor, expected: Tensor) -> None:
    assert (made - expected).abs().max() <= 1e-4
    assert (expected[0] - expected[1]).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_an_lcm_is_diffusers_lcm(chain: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import LCMScheduler

    chain.scheduler = LCMScheduler(**CHAIN)
    registry = MemoryRegistry()
    version = imported(registry, chain.directory, recipe="lcm", steps=(steps,))
    close(ours(registry, version, steps), theirs(chain, monkeypatch, steps))


@pytest.mark.filterwarnings("ignore")
def test_an_lcm_that_reads_its_guidance_weight_is_diffusers_own(
    chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import LCMScheduler, UNet2DConditionModel

    torch.manual_seed(4)
    plain = {key: value for key, value in chain.unet.config.items() if key[0] != "_"}
    unet = UNet2DConditionModel(**plain | {"time_cond_proj_dim": 8})
    unet.load_state_dict(chain.unet.state_dict(), strict=False)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    whole = type(chain)(**{**chain.components, "unet": unet.eval()}, requires_safety_checker=False)
    whole.scheduler = LCMScheduler(**CHAIN)
    whole.set_progress_bar_config(disable=True)
    whole.save_pretrained(tmp_path / "lcm")
    registry = MemoryRegistry()
    version = imported(registry, tmp_path / "lcm", recipe="lcm", steps=(4,), guidance_max=12.0)
    guidance = registry.student(version).guidance
    assert (guidance.mode, guidance.default, guidance.maximum) == ("embedded", 8.0, 12.0)
    for w in (8.0, 3.0):
        close(ours(registry, version, 4, w), theirs(whole, monkeypatch, 4, guidance_scale=w))
    assert (ours(registry, version, 4, 8.0) - ours(registry, version, 4, 3.0)).abs().max() > 0.01
    alone = import_student(
        registry, tmp_path / "lcm" / "unet", "alone", base=chain.directory, dtype="fp32",
        sampling=Sampling(recipe="lcm", steps=(4,)), golden_prompts=PROMPTS[:1],
    )  # fmt: skip
    assert alone.source == "denoiser"
    close(ours(registry, alone.version, 4), ours(registry, version, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recipe", "scheduler", "settings", "starts"),
    [
        ("lightning", "EulerDiscreteScheduler", {}, "less"),
        ("turbo", "EulerAncestralDiscreteScheduler", {}, "less"),
        ("hyper-sd", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, "unit"),
    ],
)
def test_a_recipe_is_the_scheduler_that_its_kind_is_published_with(
    chain: Any, recipe: str, scheduler: str, settings: dict[str, bool], starts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    chain.scheduler = getattr(diffusers, scheduler)(**CHAIN, timestep_spacing="trailing", **settings)
    chain.scheduler.set_timesteps(4)
    scale = (chain.scheduler.init_noise_sigma**2 + 1) ** 0.5 / chain.scheduler.init_noise_sigma
    registry = MemoryRegistry()
    version = imported(registry, chain.directory, recipe=recipe, steps=(4,))
    close(ours(registry, version, 4), theirs(chain, monkeypatch, 4, float(scale) if starts == "less" else 1.0))


def test_what_a_recipe_says_may_be_said_otherwise(chain: Any) -> None:
    registry = MemoryRegistry()
    version = imported(
        registry, chain.directory, recipe="lcm", times=((800.0, 300.0), (0.7, 0.0)), eta=(0.5,), guidance=2.0,
        guidance_max=4.0, prediction="v",
    )  # fmt: skip
    made = registry.student(version)
    assert {k: (one.times, one.eta) for k, one in made.schedules.items()} == {
        2: ((0.801, 0.301, 0.0), 0.5),
        1: ((0.7, 0.0), 0.5),
    }
    assert (made.prediction, made.solver, made.kind) == ("v", "ddim", "full")
    assert (made.guidance.mode, made.guidance.default, made.guidance.maximum) == ("cfg", 2.0, 4.0)


def test_a_one_step_lightning_predicts_the_picture_and_is_imported_by_itself(chain: Any) -> None:
    registry = MemoryRegistry()
    assert registry.student(imported(registry, chain.directory, recipe="lightning", steps=(1,))).prediction == "x0"
    with pytest.raises(InvalidRequest, match="another network"):
        imported(registry, chain.directory, recipe="lightning", steps=(1, 2))


@pytest.mark.parametrize(
    ("sampling", "error", "said"),
    [
        ({"steps": (4,)}, InvalidRequest, "no times.*--times.*lcm, lightning, turbo, hyper-sd"),
        ({"recipe": "lcm"}, InvalidRequest, "no steps"),
        ({"recipe": "nothing", "steps": (1,)}, InvalidRequest, "--as nothing: choose from lcm"),
        ({"recipe": "lcm", "steps": (60,)}, InvalidRequest, "taught at 50"),
        ({"recipe": "lcm", "steps": (0,)}, InvalidRequest, "at least one"),
        ({"steps": (4,), "times": ((999.0, 500.0),)}, InvalidRequest, "differ: the times are of 2 steps"),
        ({"times": ((0.2, 0.8),)}, InvalidRequest, "--times 0.2,0.8: they must fall"),
        ({"recipe": "lcm", "steps": (2,), "eta": (0.5, 0.5, 0.5)}, InvalidRequest, "one for each of the 2 steps"),
        ({"recipe": "lcm", "steps": (2,), "solver": "dpmpp_2m"}, InvalidManifest, "2 steps: solver DPMpp2M.*ddim"),
        ({"recipe": "lcm", "steps": (2,), "solver": "flow_match_euler", "eta": (0.0,)}, InvalidManifest, "rectified"),
        ({"recipe": "lcm", "steps": (2,), "guidance_mode": "embedded"}, InvalidRequest, "reads no guidance weight"),
        ({"recipe": "lcm", "steps": (2,), "guidance_mode": "baked"}, InvalidRequest, "which weight"),
        ({"recipe": "lcm", "steps": (2,), "guidance": 3.0, "guidance_max": 2.0}, InvalidRequest, "outside 1..2"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_anything_is_published(
    chain: Any, sampling: dict[str, Any], error: type[Exception], said: str
) -> None:
    registry = MemoryRegistry()
    with pytest.raises(error, match=said):
        imported(registry, chain.directory, **sampling)
    assert registry.students() == []


def adapter(pipeline: Any, folder: Path, form: str) -> Path:
    """A LoRA of rank 2 and alpha 4 on attention, linear layers and convolutions, by the names of `form`."""
    torch.manual_seed(3)
    layers = [
        name
        for name, layer in pipeline.unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and ("attn" in name or ".resnets." in name)
    ]
    tensors: dict[str, Tensor] = {}
    for name in layers:
        weight = pipeline.unet.get_submodule(name).weight
        a, b = torch.randn(2, *weight.shape[1:]), 0.05 * torch.randn(len(weight), 2, *(1,) * (weight.ndim - 2))
        if form == "kohya":
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(4.0)}
        else:
            tensors |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": 2 * b}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_is_diffusers_load_lora_weights(
    chain: Any, form: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import LCMScheduler

    chain.scheduler = LCMScheduler(**CHAIN)
    file, registry = adapter(chain, tmp_path, form), MemoryRegistry()
    base = imported(registry, chain.directory, recipe="lcm", steps=(4,))
    done = import_student(
        registry, file, "lora", base=base, sampling=Sampling(recipe="lcm", steps=(4,)), strength=strength
    )
    layers = sum(".lora_A." in name or ".lora_down." in name for name in load_file(file))
    assert (done.source, done.ranks, done.layers) == ("lora", (2,), layers)
    made = registry.student(done.version)
    assert (made.kind, made.base, made.parents) == ("lora", base, (base,))
    chain.load_lora_weights(tmp_path)
    chain.set_adapters(chain.get_active_adapters(), adapter_weights=strength)
    try:
        expected = theirs(chain, monkeypatch, 4)
    finally:
        chain.unload_lora_weights()
    assert (ours(registry, done.version, 4) - expected).abs().max() * 255 <= 2
    assert (ours(registry, base, 4) - expected).abs().max() * 255 > 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_a_lora_of_another_family_is_imported_over_its_base(name: str, tmp_path: Path) -> None:
    own = tiny_families.shipped(name)
    (folder,) = ("unet",) if name == "sdxl" else ("transformer",)
    network = getattr(own.pipeline, folder)
    layer = next(n for n, one in network.named_modules() if isinstance(one, torch.nn.Linear) and n.endswith("to_q"))
    weight = network.get_submodule(layer).weight
    a, b = torch.randn(3, weight.shape[1]), torch.randn(len(weight), 3)
    save_file({f"{folder}.{layer}.lora_A.weight": a, f"{folder}.{layer}.lora_B.weight": b}, tmp_path / "l.safetensors")
    done = import_student(
        own.registry, tmp_path / "l.safetensors", f"{name}-lora", base=own.version, dtype="fp32",
        sampling=Sampling(recipe="hyper-sd", steps=(2,)),
    )  # fmt: skip
    made = own.registry.student(done.version)
    assert ("w" in made.inputs) == ("w" in own.manifest.inputs)
    assert torch.allclose(stored(own.registry, made)[f"{layer}.weight"], weight + b @ a, atol=1e-5)


def stored(registry: MemoryRegistry, manifest: StudentManifest) -> dict[str, Tensor]:
    from engines.parts import load_weights

    return load_weights(registry, manifest.components["denoiser"])


def refused(chain: Any, source: Path, base: Any = None) -> str:
    registry = MemoryRegistry()
    with pytest.raises((GraphMismatch, InvalidManifest, InvalidRequest, NotBuilt)) as caught:
        import_student(
            registry, source, "bad", base=base or chain.directory, sampling=Sampling(recipe="lcm", steps=(1,))
        )
    assert registry.students() == []
    return str(caught.value)


def test_a_lora_of_another_network_is_refused_by_its_first_names(chain: Any, tmp_path: Path) -> None:
    whole = load_file(adapter(chain, tmp_path, "peft"))
    layer = next(name for name in whole if "to_q.lora_A" in name).removesuffix(".lora_A.weight")
    a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    bad = {
        "belong to no layer": {"unet.else.where.lora_A.weight": torch.ones(2, 2)},
        "one matrix of two": {a: whole[a]},
        "another shape": {a: torch.ones(2, 99), b: whole[b]},
        "change the text encoder": {"text_encoder.q.lora_A.weight": torch.ones(2, 2)},
    }
    for said, tensors in bad.items():
        save_file({**{k: v for k, v in whole.items() if k not in (a, b)}, **tensors}, tmp_path / "bad.safetensors")
        told = refused(chain, tmp_path / "bad.safetensors")
        assert said in told
        assert next(iter(tensors)).removesuffix(".lora_A.weight").removeprefix("unet.") in told


def test_weights_of_another_network_are_refused_by_their_first_names(chain: Any, tmp_path: Path) -> None:
    weights = load_file(chain.directory / "unet" / "diffusion_pytorch_model.safetensors")
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "lacks.safetensors")
    assert name in refused(chain, tmp_path / "lacks.safetensors")
    save_file({**weights, name: weights[name].flatten()[:3].clone()}, tmp_path / "shape.safetensors")
    assert name in refused(chain, tmp_path / "shape.safetensors")
    assert "of family sdxl, its base of sd" in refused(chain, tiny_families.shipped("sdxl").directory)


def test_nothing_is_unpickled_and_no_path_leads_outside(chain: Any, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"cos\nsystem\n")
    assert "unpickled" in refused(chain, tmp_path / "lora.bin")
    assert "lora.bin would have to be unpickled" in refused(chain, tmp_path)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "no safetensors file" in refused(chain, tmp_path / "junk.safetensors")
    assert "is not there" in refused(chain, tmp_path / "nothing")
    shutil.copy(chain.directory / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "secret.safetensors")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "x.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert "lacks secret.safetensors" in refused(chain, tmp_path / "sharded")


def test_a_lora_needs_a_base(chain: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"is a LoRA.*--base"):
        imported(MemoryRegistry(), adapter(chain, tmp_path, "peft"), recipe="lcm", steps=(1,))
    with pytest.raises(InvalidRequest, match=r"is a denoiser.*--base"):
        imported(MemoryRegistry(), chain.directory / "unet", recipe="lcm", steps=(1,))


@pytest.mark.filterwarnings("ignore")
def test_a_directory_of_videos_has_as_many_frames_as_the_version_that_is_its_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wan, "_SIZE", (4, 4))  # for which the tiny network has positions
    own = tiny_families.shipped("wan")
    given = {"sampling": Sampling(times=((1.0, 0.0),)), "golden_prompts": PROMPTS[:1]}
    made = import_student(own.registry, own.directory, "again", base=own.version, **given)  # type: ignore[arg-type]
    frames = own.registry.student(made.version).frames
    assert frames == own.manifest.frames
    assert frames is not None
    assert frames.number == 9
