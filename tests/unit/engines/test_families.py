import pytest
import torch

from engines.errors import GraphMismatch, InvalidManifest
from engines.families.sd import DenoiserNet, StableDiffusion
from engines.graph import spec
from engines.loader import load_student
from engines.parts import load_weights, reader
from engines.student import LoadedStudent
from tests import tiny_sd


@pytest.fixture(scope="module")
def student() -> LoadedStudent:
    teacher = tiny_sd.teacher()
    return load_student(teacher.registry, teacher.manifest)


def denoiser(*inputs: str) -> DenoiserNet:
    teacher = tiny_sd.teacher()
    manifest = teacher.manifest.model_copy(update={"inputs": frozenset(inputs)})
    network = spec(manifest, "denoiser", reader(teacher.registry, teacher.manifest)).network()
    assert isinstance(network, DenoiserNet)
    weights = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    network.load(weights, fresh=("second_time.", "guidance."))
    return network


def arguments() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(2, *tiny_sd.LATENT), "t": torch.tensor([0.9, 0.4]), "cond": torch.randn(2, 12, 16)}


def test_words_that_the_tokenizer_does_not_know_are_dropped_and_named(student: LoadedStudent) -> None:
    tokens = student.family.tokenize(["a Red zebra, circle! zebra", "a red circle"])
    assert tokens.ignored_words == (("zebra",), ())
    assert torch.equal(tokens.ids[0], tokens.ids[1])
    assert tokens.counts == (5, 5)
    assert tokens.ids.shape == (2, 12)


def test_any_prompt_is_accepted(student: LoadedStudent) -> None:
    cond = student.family.encode(["", "the left " * 50, "?!", "\n\t", "ünïcode 🦓"])
    assert cond.shape == (5, 12, 16)
    assert torch.equal(cond[2], cond[0])
    assert bool(torch.isfinite(cond).all())


def test_added_time_and_guidance_begin_as_exactly_the_teacher() -> None:
    plain, both = denoiser(), denoiser("s", "w")
    with torch.no_grad():
        expected = plain(**arguments())
        made = both(**arguments(), s=torch.tensor([0.1, 0.2]), w=torch.tensor([3.0, 5.0]))
    assert torch.equal(made, expected)


@pytest.mark.parametrize(("name", "layer"), [("s", "second_time"), ("w", "guidance")])
def test_a_network_follows_its_added_input_once_its_layer_is_not_zero(name: str, layer: str) -> None:
    network = denoiser(name)
    torch.nn.init.normal_(getattr(network, layer).weight, std=0.1)
    with torch.no_grad():
        one, two = (network(**arguments(), **{name: torch.full((2,), value)}) for value in (0.2, 0.5))
    assert not torch.allclose(one, two)


def test_without_s_a_network_that_reads_it_is_asked_at_s_equal_t() -> None:
    network = denoiser("s")
    torch.nn.init.normal_(network.second_time.weight, std=0.1)  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(network(**arguments()), network(**arguments(), s=arguments()["t"]))


def test_a_state_dict_has_the_names_of_the_blob_and_goes_back_in() -> None:
    teacher, network = tiny_sd.teacher(), denoiser("s")
    stored = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    state = network.state_dict()
    assert set(state) == set(stored) | {"second_time.weight"}
    network.load_state_dict(state, strict=True)
    inside = torch.nn.ModuleDict({"net": network}).state_dict()
    assert set(inside) == {f"net.{name}" for name in state}


def test_a_fresh_layer_may_be_missing_only_where_it_is_allowed() -> None:
    teacher, network = tiny_sd.teacher(), denoiser("s")
    stored = load_weights(teacher.registry, teacher.manifest.components["denoiser"])
    with pytest.raises(GraphMismatch, match="second_time"):
        network.load(stored)


def test_names_with_the_prefix_of_older_libraries_are_read() -> None:
    teacher = tiny_sd.teacher()
    network = spec(teacher.manifest, "encoder", reader(teacher.registry, teacher.manifest)).network()
    stored = load_weights(teacher.registry, teacher.manifest.components["encoder"])
    network.load({f"text_model.{name}": value for name, value in stored.items()})


def test_guidance_is_u_plus_w_times_the_difference(student: LoadedStudent) -> None:
    given, family = arguments(), student.family
    given["cond"] = family.encode(["a red circle", "two shapes"])
    c = family.denoise(**given)
    u = family.denoise(given["x"], given["t"], family.encode(["", ""]))
    made = family.denoise(**given, w=[2.5, None])
    torch.testing.assert_close(made[0], (u + 2.5 * (c - u))[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[1], c[1], rtol=1e-4, atol=1e-5)


def test_a_negative_prompt_stands_for_the_empty_one(student: LoadedStudent) -> None:
    given, family = arguments(), student.family
    given["cond"], bad = family.encode(["a red circle", "two shapes"]), family.encode(["blue", "white"])
    u = family.denoise(given["x"], given["t"], bad)
    c = family.denoise(**given)
    made = family.denoise(**given, w=[2.0, 3.0], negative=bad)
    torch.testing.assert_close(made, u + torch.tensor([2.0, 3.0]).view(2, 1, 1, 1) * (c - u), rtol=1e-4, atol=1e-5)
    second = family.denoise(**given, w=[None, 3.0], negative=bad)
    torch.testing.assert_close(second, torch.stack([c[0], made[1]]), rtol=1e-4, atol=1e-5)


def test_a_guided_row_is_two_rows_unless_the_network_reads_its_weight(student: LoadedStudent) -> None:
    engine = student.family.encode  # any engine will do: none is asked
    reads = StableDiffusion(engine, engine, engine, inputs=frozenset("w"))  # type: ignore[arg-type]
    assert [student.family.network_rows(w) for w in (None, 3.0)] == [1, 2]
    assert reads.network_rows(3.0) == 1


def test_a_shifted_vae_is_refused_since_the_pipeline_would_ignore_the_shift() -> None:
    teacher = tiny_sd.teacher()
    config = reader(teacher.registry, teacher.manifest)("decoder/config.json")
    shifted = config.replace(b'"shift_factor": null', b'"shift_factor": 0.1')
    assert shifted != config
    with pytest.raises(InvalidManifest, match="shift_factor"):
        StableDiffusion.network("decoder", lambda name: shifted, latent=tiny_sd.LATENT)
