"""Each family is diffusers' own pipeline, with the scheduler that the family ships; and what an import refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines import plugins, shipped
from engines.artefact import export_diffusers, import_diffusers
from engines.errors import InvalidManifest, NotBuilt
from engines.families._text import Packing
from engines.graph import GraphStore, spec
from engines.loader import load_student
from engines.manifest import ProcessSpec
from engines.noise import noise
from engines.parts import load_weights, reader
from engines.registry.memory import MemoryRegistry
from engines.student import sample
from tests import tiny_families
from tests.tiny_families import FAMILIES, STEPS, imported

PROMPTS, SEEDS = ["a red circle", "two shapes on the left"], [11, 12]
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@pytest.mark.filterwarnings("ignore")
def test_pictures_are_those_of_diffusers_own_pipeline(name: str) -> None:
    own = tiny_families.shipped(name)
    tiny, manifest = own.tiny, own.manifest
    latents = torch.stack([noise(seed, 0, manifest.latent_shape(tiny.pixels, tiny.pixels)) for seed in SEEDS])
    asked = {"guidance_scale": tiny.scale, "output_type": "pt"} | dict(tiny.call)
    expected = tiny.pictures(
        own.pipeline(
            list(PROMPTS), height=tiny.pixels, width=tiny.pixels, latents=tiny.latents(latents),
            num_inference_steps=STEPS, **asked,
        )
    )  # fmt: skip
    made = sample(load_student(own.registry, manifest), PROMPTS, SEEDS, STEPS, rounded=False) / 255
    assert made.shape == expected.shape
    assert (made - expected).abs().max() <= 1e-4
    inside = (expected > 0.02) & (expected < 0.98)
    assert inside.float().mean() > 0.5, "a picture that is black or white compares nothing"
    assert (expected[0] - expected[1]).abs().max() > 0.05


def test_every_family_file_is_compared_here() -> None:
    assert {tiny_families.shipped(name).manifest.family for name in FAMILIES} == set(plugins.names("engines.families"))


class OnTheHost(TorchDispatchMode):
    """Operators whose results are in the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = operator(*args, **(kwargs or {}))
        if any(part.device.type == "cpu" for part in tree_leaves(made) if isinstance(part, torch.Tensor)):
            self.found.add(str(operator))
        return made


# Their encoders and one denoiser read values of their inputs, which a device without memory has not.
NEED_VALUES = {(name, "encoder") for name in ("pixart", "qwen_image", "wan", "wan-picture", "z_image")} | {
    ("z_image", "denoiser")
}


@pytest.mark.parametrize("role", ["encoder", "denoiser", "decoder"])
@every_family
def test_a_network_makes_nothing_on_the_host_which_no_cuda_graph_could_hold(name: str, role: str) -> None:
    if (name, role) in NEED_VALUES:
        pytest.skip("it reads values of its inputs")
    own = tiny_families.shipped(name)
    graph = GraphStore(None).graph(spec(own.manifest, role, reader(own.registry, own.manifest)))
    elsewhere = {port: value.to("meta") for port, value in graph.example(2).items()}
    network = graph.module().to("meta")
    with torch.no_grad(), OnTheHost() as mode:
        network(**elsewhere)
    assert not mode.found


@every_family
def test_a_row_is_the_same_picture_alone_and_in_a_batch(name: str) -> None:
    student = load_student(tiny_families.shipped(name).registry, tiny_families.shipped(name).manifest)
    together = sample(student, [*PROMPTS, ""], [*SEEDS, 13], STEPS, rounded=False)
    alone = sample(student, PROMPTS[1:], SEEDS[1:], STEPS, rounded=False)
    assert (together[1:2] - alone).abs().max() <= 0.02  # of 255 levels


@every_family
@pytest.mark.parametrize("added", ["s", "w"])
def test_an_added_input_begins_as_exactly_the_teacher_and_acts_once_its_layer_is_not_zero(
    name: str, added: str
) -> None:
    own = tiny_families.shipped(name)
    if added in own.tiny.inputs:
        pytest.skip("the network has this input of itself")
    manifest = own.manifest.model_copy(update={"inputs": own.manifest.inputs | {added}})
    network = spec(manifest, "denoiser", reader(own.registry, own.manifest)).network()
    plain = spec(own.manifest, "denoiser", reader(own.registry, own.manifest)).network()
    weights = load_weights(own.registry, own.manifest.components["denoiser"])
    network.load(weights, fresh=("second_time.", "guidance."))
    plain.load(weights)
    torch.manual_seed(1)
    given = {port.name: torch.randn(2, *port.shape) for port in plain.ports} | {"t": torch.tensor([0.9, 0.4])}
    given["cond"] = load_student(own.registry, own.manifest).family.encode(PROMPTS)
    with torch.no_grad():
        expected, made = plain(**given), network(**given, **{added: torch.tensor([0.1, 0.2])})
        assert torch.equal(made, expected)
        layer = "second_time" if added == "s" else "guidance"
        torch.nn.init.normal_(network.get_submodule(layer).weight, std=0.5)
        one, two = (network(**given, **{added: torch.full((2,), value)}) for value in (0.2, 0.5))
    assert not torch.allclose(one, two)
    assert not torch.allclose(one, expected)


def test_a_condition_is_unpacked_as_it_was_packed() -> None:
    packing = Packing(tokens=3, width=4, extras=(6, 2))
    hidden, pooled, mask = torch.randn(2, 3, 4), torch.randn(2, 6), torch.tensor([[1, 0], [1, 1]])
    cond = packing.pack(hidden, pooled, mask)
    assert cond.shape[1:] == packing.shape == (6, 4)
    for got, put in zip(packing.unpack(cond), (hidden, pooled, mask.float()), strict=True):
        assert torch.equal(got, put)
    narrow = packing.unpack(packing.pack(hidden[:, :, :3], pooled, mask))[0]
    assert torch.equal(narrow, torch.nn.functional.pad(hidden[:, :, :3], (0, 1)))


@every_family
def test_an_export_has_the_weights_and_files_that_the_import_had(name: str, tmp_path: Path) -> None:
    own = tiny_families.shipped(name)
    if own.manifest.inputs:
        with pytest.raises(NotBuilt, match="'w'"):
            export_diffusers(own.registry, own.version, tmp_path)
        return
    export_diffusers(own.registry, own.version, tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        ours, theirs = load_file(file), load_file(own.directory / file.relative_to(tmp_path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    written, given = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path, own.directory)
    )
    not_read = {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/generation_config.json"}
    assert given - written <= not_read
    assert written <= given


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    own = tiny_families.shipped("sd3")
    shutil.copytree(own.directory, tmp_path / "sharded")
    folder = tmp_path / "sharded" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    own.pipeline.transformer.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    registry = MemoryRegistry()
    version = imported(own.tiny, tmp_path / "sharded", registry)
    one, other = (
        sample(load_student(*each), PROMPTS, SEEDS, STEPS)
        for each in ((own.registry, own.manifest), (registry, registry.student(version)))
    )
    assert torch.equal(one, other)


def test_an_unknown_pipeline_is_refused_with_its_name_and_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22Pipeline"}))
    with pytest.raises(NotBuilt, match=r"KandinskyV22Pipeline.*FluxPipeline.*StableDiffusionXLPipeline.*WanPipeline"):
        import_diffusers(tmp_path, MemoryRegistry(), name="tiny", schedules=(4,))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "PNDMScheduler"}, "PNDM asks twice.*DDIMScheduler"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "no plan follows Euler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order=3.*set it to 2"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace", "clip_sample": False}, "linspace"),
        ({"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"}, "sigma_min"),
        ({"_class_name": "EDMEulerScheduler", "final_sigmas_type": "sigma_min"}, "sigma_min.*set it to 'zero'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True}, "euler_at_final"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "'midpoint' or 'bh2'"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "set it to 'leading'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "stochastic_sampling"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": 500}, "num_train_timesteps"),
    ],
)
def test_a_scheduler_that_no_plan_can_follow_is_refused(config: dict[str, object], said: str) -> None:
    chain = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
    with pytest.raises(NotBuilt, match=said):
        shipped.schedule({**chain, **config}, 4, (8, 8))


def test_noise_without_a_process_is_refused_unless_one_is_given() -> None:
    config = {"_class_name": "CMStochasticIterativeScheduler", "prediction_type": "epsilon"}
    with pytest.raises(NotBuilt, match="CMStochasticIterativeScheduler"):
        shipped.read(config)
    given = shipped.read(config, ProcessSpec(kind="edm"))
    assert (given.process.kind, given.prediction, given.solver) == ("edm", "eps", "ddim")


def test_a_scheduler_of_edm_means_a_preconditioned_network() -> None:
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_max": 80.0}
    assert shipped.read(config) == shipped.Shipped(
        ProcessSpec(kind="edm", sigma_data=0.5, sigma_max=80.0), "edm", "ddim"
    )
    assert shipped.read({**config, "prediction_type": "v_prediction"}).prediction == "v"
    with pytest.raises(NotBuilt, match=r"prediction_type='sample'.*epsilon, v_prediction"):
        shipped.read({**config, "prediction_type": "sample"})
    with pytest.raises(NotBuilt, match="lacks sigma_max"):
        shipped.read({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5})


def test_a_mean_per_channel_is_refused_where_the_pipeline_would_not_undo_it() -> None:
    own = tiny_families.shipped("sdxl-edm")
    family = plugins.load("engines.families", "sd", "FAMILY")
    with pytest.raises(InvalidManifest, match="latents_mean"):
        family.network("decoder", reader(own.registry, own.manifest), latent=(4, 8, 8))


def test_a_config_that_says_no_prediction_means_eps_and_one_without_its_noise_is_refused() -> None:
    chain = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    assert shipped.read({**chain, "beta_start": 0.00085, "beta_end": 0.012}).prediction == "eps"
    with pytest.raises(NotBuilt, match="lacks beta_start, beta_end"):
        shipped.read(chain)
    with pytest.raises(NotBuilt, match="prediction_type='other'"):
        shipped.read({**chain, "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "other"})


def test_a_scheduler_s_times_are_not_taken_for_another_process(tmp_path: Path) -> None:
    own = tiny_families.shipped("sd3")
    with pytest.raises(InvalidManifest, match="process"):
        import_diffusers(own.directory, MemoryRegistry(), name="a", schedules=(4,), process=ProcessSpec(shift=3.0))


@pytest.mark.parametrize("name", ["pixart", "sana", "wan", "qwen_image", "z_image", "flux", "sd3", "sdxl", "sd"])
def test_another_network_in_the_denoiser_s_folder_is_refused_by_name(name: str) -> None:
    own = tiny_families.shipped(name)
    read = reader(own.registry, own.manifest)

    def other(file: str) -> bytes:
        config = json.loads(read(file))
        return json.dumps(config | ({"_class_name": "Strange"} if file.startswith("denoiser/") else {})).encode()

    family = plugins.load("engines.families", own.manifest.family, "FAMILY")
    with pytest.raises(InvalidManifest, match="Strange"):
        family.network("denoiser", other, latent=own.manifest.latent_shape(own.tiny.pixels, own.tiny.pixels))
