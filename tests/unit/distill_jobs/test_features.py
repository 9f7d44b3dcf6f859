"""The committed feature network reads real pictures, and its training can be stopped and continued."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_jobs.evaluate import alignment, features, features_train
from distill_jobs.evaluate.features import FeatureNetwork
from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers.shapes import data
from engines.errors import CorruptBlob

WEIGHTS = TASK.weights / features.WEIGHTS


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return features.load()


def options(folder: Path, updates: int) -> features_train.Options:
    return features_train.Options(
        task=TASK,
        updates=updates,
        batch=4,
        lr=1e-3,
        seed=1,
        size=32,
        checkpoint=folder / "check.safetensors",
        out=folder / "out",
    )


def test_it_is_small() -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert {value.dtype for value in load_file(WEIGHTS).values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_it_reads_what_the_captions_of_real_pictures_state(network: FeatureNetwork, split: data.Split) -> None:
    pictures = data.sample(300, 12_345, split=split)
    found = network.observe(pictures.pixels).attributes
    by_name = alignment.by_attribute(found, pictures.attributes, TASK.attributes)
    assert min(share for share in by_name.values() if share is not None) > 0.98


def test_features_of_real_pictures_are_centred_and_scaled(network: FeatureNetwork) -> None:
    seen = network.observe(data.sample(300, 54_321, split="all").pixels).features
    learned = seen[:, : -features.ROUGHNESS]
    assert seen.shape == (300, features.DIMENSIONS)
    assert abs(learned.mean()) < 0.05
    assert learned.std(0).mean() == pytest.approx(1, abs=0.1)


def test_a_picture_is_seen_the_same_alone_and_in_any_batch(network: FeatureNetwork) -> None:
    pixels = data.sample(140, 3).pixels
    together = network.observe(pixels).features
    np.testing.assert_allclose(network.observe(pixels[130:131]).features, together[130:131], atol=2e-4)


def test_unrounded_pictures_are_seen_as_a_reader_of_the_file_sees_them(network: FeatureNetwork) -> None:
    pixels = data.sample(4, 3).pixels
    nearly = pixels.astype(np.float32) + 0.3
    np.testing.assert_array_equal(network.observe(nearly).features, network.observe(pixels).features)


@pytest.mark.parametrize("size", [32, 48, 128])
def test_pictures_of_any_size_have_the_same_features_count(network: FeatureNetwork, size: int) -> None:
    assert network.observe(data.sample(2, 0, size=size).pixels).features.shape == (2, features.DIMENSIONS)


def test_faint_grain_moves_its_features(network: FeatureNetwork) -> None:
    pixels = data.sample(50, 4).pixels
    grainy = pixels + np.random.default_rng(0).normal(0, 3, pixels.shape).astype(np.float32)
    rough = slice(-features.ROUGHNESS, None)
    before, after = network.observe(pixels).features[:, rough], network.observe(grainy).features[:, rough]
    assert (after.mean(0) > before.mean(0)).all()
    assert np.linalg.norm(after.mean(0) - before.mean(0)) > 0.4


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tensors = load_file(WEIGHTS)
    tensors.pop("embed.weight")
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(CorruptBlob, match=r"embed\.weight"):
        features.load(path=tmp_path / "part.safetensors")


def test_another_file_has_another_digest(network: FeatureNetwork, tmp_path: Path) -> None:
    tensors = load_file(WEIGHTS)
    tensors["heads.bias"][0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    assert features.load(path=tmp_path / "other.safetensors").digest != network.digest


def test_a_continued_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    whole = features_train.Training(options(tmp_path / "whole", 6))
    losses = [whole.update() for _ in range(6)]
    first = features_train.Training(options(tmp_path / "halves", 6))
    again = [first.update() for _ in range(3)]
    first.save()
    second = features_train.Training(options(tmp_path / "halves", 6))
    assert second.done == 3
    again += [second.update() for _ in range(3)]
    assert again == losses
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name]), name


def test_training_writes_a_network_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_train, "_SCALE_PICTURES", 16)
    monkeypatch.setattr(features_train, "_CHECK_PICTURES", 16)
    small = replace(options(tmp_path, 2), out=tmp_path / "net.safetensors")
    reached = features_train.train(small)
    assert 0 <= reached <= 1
    assert features.load(path=small.out).observe(data.sample(2, 0).pixels).features.shape == (2, features.DIMENSIONS)
