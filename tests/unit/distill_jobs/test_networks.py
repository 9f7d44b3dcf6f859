"""Feature networks out of directories: what they see, what their figures say, and what is refused."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_jobs.evaluate import frechet, networks, report
from distill_jobs.evaluate.network_reference import NetworkReference, network_reference
from distill_jobs.evaluate.networks import DirectoryNetwork
from distill_jobs.evaluate.questions import Questions, questions, real_set
from distill_jobs.evaluate.reference import Reference, TeacherSample
from distill_jobs.evaluate.sample import of
from distill_jobs.forgetting import Forget
from distill_jobs.spec import DataSpec, EvalSpec, GateSpec
from engines.errors import InvalidRequest

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
N = 200


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=64, patch_size=16
        )
    )


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16,
        )
    )  # fmt: skip


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=clip_vision().config))


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic", hidden_act="relu")
    )


def saved(folder: Path, name: str, model: Any, **preprocessing: Any) -> Path:
    model.save_pretrained(folder / name)
    said = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": False, "do_center_crop": False, "do_convert_rgb": True, "do_rescale": True, "do_normalize": True,
        "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / name / "preprocessor_config.json").write_text(json.dumps(said | preprocessing))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("data"), "dino", dinov2())


@pytest.fixture(scope="module")
def network(data: Path) -> DirectoryNetwork:
    return networks.load("dino", data)


@pytest.fixture(scope="module")
def asked() -> Questions:
    return questions(N)


@pytest.fixture(scope="module")
def drawn(asked: Questions) -> np.ndarray:
    """The teacher's pictures."""
    return asked.draw(5, 64)


@pytest.fixture(scope="module")
def looked(
    network: DirectoryNetwork, asked: Questions, drawn: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> NetworkReference:
    return network_reference(
        network,
        asked,
        64,
        tmp_path_factory.mktemp("answers"),
        teacher="t",
        answers=lambda: network.observe(drawn),
        real_pictures=300,
    )


def noisy(pictures: np.ndarray, levels: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, levels, pictures.shape)
    return (pictures + noise).clip(0, 255).astype(np.float32)


# what is seen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dinov2, clip_vision, clip, resnet])
def test_features_are_the_pooled_output_on_normalised_pictures(
    make: Callable[[], Any], tmp_path: Path, drawn: np.ndarray
) -> None:
    model = make().eval()
    seen = networks.load("net", saved(tmp_path, "net", model)).observe(drawn[:3])
    per_channel = [torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD)]
    given = (torch.from_numpy(drawn[:3]).float() / 255 - per_channel[0]) / per_channel[1]
    with torch.no_grad():
        pooled = getattr(model, "vision_model", model)(pixel_values=given).pooler_output.flatten(1)
    assert seen.shape == (3, 24)
    np.testing.assert_allclose(seen, pooled.numpy(), atol=1e-5)


def test_pictures_are_resized_and_cropped_as_the_directory_says(tmp_path: Path, drawn: np.ndarray) -> None:
    from PIL import Image

    asked = {"do_resize": True, "size": {"shortest_edge": 96}, "do_center_crop": True, "crop_size": 64, "resample": 3}
    sized = networks.load("net", saved(tmp_path, "net", dinov2(), **asked))
    plain = networks.load("plain", saved(tmp_path, "plain", dinov2()))
    by_hand = Image.fromarray(np.moveaxis(drawn[0], 0, -1)).resize((96, 96), Image.Resampling.BICUBIC)
    cropped = np.moveaxis(np.asarray(by_hand.crop((16, 16, 80, 80))), -1, 0)
    model = {name: value for name, value in sized.model.state_dict().items()}
    plain.model.load_state_dict(model)
    np.testing.assert_allclose(sized.observe(drawn[:1]), plain.observe(cropped[None]), atol=1e-5)


def test_rows_do_not_depend_on_their_batch_and_are_rounded_first(network: DirectoryNetwork, drawn: np.ndarray) -> None:
    whole = network.observe(drawn[:40])
    np.testing.assert_allclose(whole[35:36], network.observe(drawn[35:36]), atol=1e-5)
    np.testing.assert_allclose(whole, network.observe(drawn[:40].astype(np.float32) + 0.3), atol=1e-5)


# what the figures say ----------------------------------------------------------------------------------------------


def test_the_distance_of_a_set_to_itself_is_zero(network: DirectoryNetwork, drawn: np.ndarray) -> None:
    seen = network.observe(drawn)
    fitted = frechet.fit(seen)
    assert frechet.distance(fitted, fitted) == pytest.approx(0, abs=1e-6 * np.trace(fitted.covariance))


def test_the_teacher_s_own_answers_have_the_ratio_one(looked: NetworkReference, asked: Questions) -> None:
    found = looked.figures(looked.teacher, asked, 10, compared=True)
    assert found.fd_ratio == pytest.approx(1)
    assert found.fd_ratio_ci == pytest.approx((1, 1))
    assert found.fd_ci is not None
    assert found.fd_ci[0] <= found.fd <= found.fd_ci[1]
    assert found.fd == pytest.approx(found.fd_floor, rel=0.5)  # the teacher here draws real pictures


def test_more_noise_is_a_larger_distance(
    looked: NetworkReference, network: DirectoryNetwork, asked: Questions, drawn: np.ndarray
) -> None:
    seen = [looked.figures(network.observe(noisy(drawn, level)), asked, 0, compared=True) for level in (0, 20, 60)]
    distances = [one.fd for one in seen]
    assert distances == sorted(distances)
    assert distances[2] > 3 * distances[0]
    assert seen[2].precision < seen[0].precision
    assert seen[0].fd_ci is None


def test_an_evaluation_reports_every_network_beside_the_embedded_one(
    looked: NetworkReference, asked: Questions, drawn: np.ndarray
) -> None:
    own = Reference.load()
    theirs = of(drawn, own.network)
    teacher = TeacherSample("ab" * 32, 32, 2.0, 0, theirs, frechet.fit(theirs.features))
    both = own.with_teacher(teacher).beside([looked])
    row = {seed: i for i, seed in enumerate(asked.seeds)}

    def sampler(captions: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
        return noisy(drawn, 60)[[row[seed] for seed in seeds]]

    found = report.evaluate(sampler, n=N, seed=0, steps=4, reference=both, rounds=0)
    other = found.networks["dino"]
    assert other.fd_ratio is not None
    assert other.fd_ratio > 1
    assert other.digest == looked.network.digest
    alone = report.evaluate(sampler, n=N, seed=0, steps=4, reference=own.with_teacher(teacher), rounds=0)
    assert alone.networks == {}
    assert found.model_copy(update={"networks": {}}) == alone
    theirs = report.teacher_metrics(N, 0, both).networks["dino"]
    assert theirs.fd_ratio is None
    assert found.networks["dino"].fd_ratio == pytest.approx(other.fd / theirs.fd)
    resamples: list[None] = []
    report.evaluate(sampler, n=N, seed=0, steps=4, reference=both, rounds=2, check=lambda: resamples.append(None))
    assert len(resamples) == 2 * 4  # of the distance and of its ratio, in each network


def test_figures_with_other_networks_or_under_other_names_are_told_apart(looked: NetworkReference) -> None:
    own = Reference.load()
    renamed = replace(looked, network=replace(looked.network, name="other"))
    retrained = replace(looked, network=replace(looked.network, digest="ab" * 32))
    every = [own, own.beside([looked]), own.beside([renamed]), own.beside([retrained]), own.beside([looked, renamed])]
    assert len({reference.digest for reference in every}) == len(every)
    assert own.beside([looked]).digest == own.beside([looked]).digest


def test_a_student_that_forgets_is_judged_by_the_other_prompts_in_every_network(
    network: DirectoryNetwork, asked: Questions, drawn: np.ndarray, tmp_path: Path
) -> None:
    rules = [Forget(concept="red", instead="blue")]
    plain = Reference.load()
    theirs = of(drawn, plain.network)
    teacher = TeacherSample("ab" * 32, 32, 2.0, 0, theirs, frechet.fit(theirs.features))
    own = plain.with_teacher(teacher).forgetting(rules, pictures=200)
    kept = own.kept(asked)
    seen = network_reference(
        network, kept, 64, tmp_path, without=rules, teacher="t", answers=lambda: network.observe(drawn),
        real_pictures=200,
    )  # fmt: skip
    assert len(seen.rows) == kept.n < N
    pictures = real_set(200, 64, own.task, without=rules)
    np.testing.assert_allclose(seen.real.mean, network.observe(pictures).mean(axis=0), atol=1e-4)
    row = {seed: i for i, seed in enumerate(asked.seeds)}
    changed = drawn.copy()
    changed[np.setdiff1d(np.arange(N), kept.rows)] = 0  # the answers to prompts of red things alone
    found = report.evaluate(
        lambda captions, seeds, steps: changed[[row[seed] for seed in seeds]],
        n=N, seed=0, steps=4, reference=own.beside([seen]), rounds=0,
    ).networks["dino"]  # fmt: skip
    assert found.fd_ratio == pytest.approx(1)


def test_what_was_seen_is_kept_and_not_looked_at_again(
    network: DirectoryNetwork, asked: Questions, drawn: np.ndarray, tmp_path: Path
) -> None:
    times: list[str] = []

    def again(teacher: str) -> NetworkReference:
        def answers() -> np.ndarray:
            times.append(teacher)
            return network.observe(drawn)

        return network_reference(network, asked, 64, tmp_path, teacher=teacher, answers=answers, real_pictures=50)

    first, second = again("one"), again("one")
    again("two")
    assert times == ["one", "two"]
    np.testing.assert_array_equal(first.teacher, second.teacher)
    np.testing.assert_array_equal(first.real.covariance, second.real.covariance)


def test_the_work_can_be_stopped_between_batches(network: DirectoryNetwork, drawn: np.ndarray) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        network.observe(drawn[:1], stop)


# what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../data/dino", "dino/../dino", ".", "missing", "/etc"])
def test_only_a_directory_of_the_distiller_s_own_is_a_network(data: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not here: choose from dino") as refusal:
        networks.load(name, data)
    assert refusal.value.param == "eval.networks"


def test_every_directory_that_is_offered_can_be_named(tmp_path: Path) -> None:
    for name in ("DINOv2-small", "dino v2", ".hidden", "clip.b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with pytest.raises(InvalidRequest, match=r"choose from DINOv2-small, clip\.b$"):
        networks.folder_of("missing", tmp_path)
    asked = EvalSpec(networks=("DINOv2-small", "clip.b"))
    gates = GateSpec(networks=dict.fromkeys(asked.networks, 1.5))
    assert {"fd_ratio.DINOv2-small", "fd_ratio.clip.b"} < gates.limits.keys()
    assert DataSpec(images="DINOv2-small").images == "DINOv2-small"


def test_without_a_data_directory_there_are_no_networks() -> None:
    with pytest.raises(InvalidRequest, match="need DISTILLER_DATA_DIR"):
        networks.folder_of("dino", None)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, "pickled", dinov2())
    weights = folder / "pickled" / "model.safetensors"
    torch.save(load_file(weights), folder / "pickled" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InvalidRequest, match=r"'pickled' has no \*\.safetensors"):
        networks.load("pickled", folder)


def test_a_directory_that_does_not_say_how_pictures_are_prepared_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bare", dinov2())
    (folder / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(InvalidRequest, match=r"'bare' has no preprocessor_config\.json"):
        networks.load("bare", folder)


@pytest.mark.filterwarnings("ignore")
def test_a_directory_that_lacks_some_weights_is_refused_instead_of_drawing_them(tmp_path: Path) -> None:
    folder = saved(tmp_path, "half", dinov2())
    weights = folder / "half" / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("layernorm")}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(InvalidRequest, match=r"lacks 2 weights, first layernorm\.bias"):
        networks.load("half", folder)


def test_shards_and_adapters_that_the_digest_does_not_name_are_refused(tmp_path: Path) -> None:
    """transformers itself would unpickle the shards, and read the weights of another directory."""
    folder = saved(tmp_path, "sharded", dinov2())
    weights = load_file(folder / "sharded" / "model.safetensors")
    (folder / "sharded" / "model.safetensors").rename(folder / "sharded" / "other.safetensors")
    torch.save(weights, folder / "sharded" / "shard.bin")
    index = folder / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.bin")}))
    with pytest.raises(InvalidRequest, match=r"weights in shard\.bin"):
        networks.load("sharded", folder)
    index.write_text("[]")
    with pytest.raises(InvalidRequest, match="index that cannot be read"):
        networks.load("sharded", folder)
    saved(tmp_path, "adapted", dinov2())
    (folder / "adapted" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(InvalidRequest, match=r"weights in adapter_config\.json"):
        networks.load("adapted", folder)


def test_shards_of_the_directory_itself_are_read(tmp_path: Path, drawn: np.ndarray) -> None:
    torch.manual_seed(0)
    model = dinov2()
    whole = networks.load("whole", saved(tmp_path, "whole", model)).observe(drawn[:2])
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    (tmp_path / "parts" / "preprocessor_config.json").write_bytes(
        (tmp_path / "whole" / "preprocessor_config.json").read_bytes()
    )
    np.testing.assert_array_equal(networks.load("parts", tmp_path).observe(drawn[:2]), whole)


def without_pooling() -> Any:
    from transformers import ViTMAEConfig, ViTMAEModel

    return ViTMAEModel(
        ViTMAEConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=64
        )
    )  # fmt: skip


def of_no_numbers() -> Any:
    model = dinov2()
    with torch.no_grad():
        model.layernorm.bias.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("make", "why"), [(without_pooling, "gives no features"), (of_no_numbers, "features that are no numbers")]
)
def test_a_network_without_features_is_refused_before_any_work(
    make: Callable[[], Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        networks.load("net", saved(tmp_path, "net", make()))


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "cut", dinov2())
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    saved(tmp_path, "wide", dinov2())
    config = folder / "wide" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 48}))
    saved(tmp_path, "listed", dinov2())
    (folder / "listed" / "preprocessor_config.json").write_text("[]")
    for name in ("cut", "wide", "listed"):
        with pytest.raises(InvalidRequest, match=f"the network '{name}' cannot be loaded"):
            networks.load(name, folder)


def test_a_network_that_reads_text_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    folder = saved(tmp_path, "words", BertModel(config))
    with pytest.raises(InvalidRequest, match="BertModel, which sees no pictures"):
        networks.load("words", folder)
