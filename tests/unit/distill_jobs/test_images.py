"""Pictures of a folder or of a task become rows of latents and captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from distill_jobs.data import images
from distill_jobs.forgetting import Forget
from distill_jobs.methods.base import Workspace
from distill_jobs.stage import Stage, StageRun
from distill_jobs.teachers import diffusers
from distill_jobs.teachers.diffusers import Teacher
from engines.errors import InvalidRequest
from tests import tiny_families, tiny_sd

CAPTIONS = ("a red circle", "a blue square", "two shapes on white")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    tiny = tiny_sd.teacher()
    return diffusers.load(tiny.registry, tiny.version)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """`holiday`, with one picture for each caption, wider than the teacher's 16 × 16."""
    folder = tmp_path / "data" / "holiday"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / images.METADATA).write_text("\n".join(rows))
    return folder.parent


def test_latents_are_those_of_the_teacher_s_own_autoencoder(teacher: Teacher, folders: Path, tmp_path: Path) -> None:
    found = images.captioned("holiday", folders, (16, 16))
    source = images.encoded(teacher, tiny_sd.teacher().registry, found, tmp_path / "cache")
    vae = AutoencoderKL.from_pretrained(tiny_sd.teacher().directory / "vae")
    middle = np.asarray(Image.open(folders / "holiday/1.png"))[:, 4:20]
    with torch.no_grad():
        given = torch.from_numpy(middle.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = vae.encode(given).latent_dist.mode() * vae.config.scaling_factor
    rows = source.rows(0, 3)
    assert rows.x is not None
    at = source.captions(0, 3).index(CAPTIONS[1])
    torch.testing.assert_close(rows.x[at], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows.cond[at], teacher.encode([CAPTIONS[1]])[0])


def test_latents_are_whitened_as_the_decoder_expects_them(folders: Path, tmp_path: Path) -> None:
    own = tiny_families.shipped("sdxl-edm")
    teacher, vae = diffusers.load(own.registry, own.version), own.pipeline.vae
    pictures = images.captioned("holiday", folders, (16, 16))
    source = images.encoded(teacher, own.registry, pictures, tmp_path / "cache")
    rows, at = source.rows(0, 3), source.captions(0, 3).index(CAPTIONS[1])
    given = torch.from_numpy(pictures.read(1, 2)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.decode(vae.encode(given).latent_dist.mode()).sample.clamp(-1, 1)
        assert rows.x is not None
        found = teacher.decoder(rows.x[at : at + 1]) / 127.5 - 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_pictures_are_encoded_once_for_their_content(teacher: Teacher, folders: Path, tmp_path: Path) -> None:
    cache, registry = tmp_path / "cache", tiny_sd.teacher().registry

    def files() -> int:
        images.encoded(teacher, registry, images.captioned("holiday", folders, (16, 16)), cache)
        return len(list(cache.iterdir()))

    assert (files(), files()) == (1, 1)
    Image.new("RGB", (16, 16)).save(folders / "holiday/0.png")
    assert files() == 2


def test_a_method_that_learns_from_latents_makes_none_where_pictures_are_given(
    teacher: Teacher, folders: Path, tmp_path: Path
) -> None:
    source = images.encoded(
        teacher, tiny_sd.teacher().registry, images.captioned("holiday", folders, (16, 16)), tmp_path / "cache"
    )
    stage = Stage("ect", 1, {"counts": (1,), "batch": 4})
    run = StageRun(0, stage, teacher.denoiser, teacher.beginner(frozenset()))
    assert run.method.prepare(source, Workspace())
    rows = run.method.rows(source, 0)
    torch.testing.assert_close(rows.x, source.rows(0, 4).x)


def test_a_task_draws_its_pictures_and_says_what_they_show(teacher: Teacher, tmp_path: Path) -> None:
    found = images.captioned("shapes", None, (16, 16), count=40)
    assert len(found.captions) == 40
    assert found.read(0, 40).shape == (40, 16, 16, 3)
    np.testing.assert_array_equal(found.read(32, 40), images.captioned("shapes", None, (16, 16), count=40).read(32, 40))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"file_name": "../secret.png", "text": "a"}', "is no file of the folder"),
        ('{"file_name": "missing.png", "text": "a"}', "is no file of the folder"),
        ('{"file_name": "0.png"}', "line 1 is not"),
        ('{"file_name": "0.png", "text": null}', "line 1 is not"),
        ('{"file_name": "a\\u0000b.png", "text": "a"}', "line 1 is not"),
        ("[]", "line 1 is not"),
        ("no json", "line 1 is not"),
        ("", "names no picture"),
    ],
)
def test_a_line_that_names_no_picture_of_the_folder_is_refused(folders: Path, line: str, told: str) -> None:
    Image.new("RGB", (8, 8)).save(folders / "secret.png")
    (folders / "holiday" / images.METADATA).write_text(line)
    with pytest.raises(InvalidRequest, match=told):
        images.captioned("holiday", folders, (16, 16))


def test_captions_may_hold_other_line_ends_and_the_file_a_mark_at_its_beginning(folders: Path) -> None:
    row = json.dumps({"file_name": "0.png", "text": "one\u2028two"}, ensure_ascii=False)
    (folders / "holiday" / images.METADATA).write_text(row, encoding="utf-8-sig")
    assert images.captioned("holiday", folders, (16, 16)).captions == ("one\u2028two",)


def test_metadata_that_is_no_text_is_refused(folders: Path) -> None:
    (folders / "holiday" / images.METADATA).write_bytes(b"\xff\xfe{}")
    with pytest.raises(InvalidRequest, match="is not UTF-8"):
        images.captioned("holiday", folders, (16, 16))


def test_a_file_that_is_no_picture_is_named(folders: Path) -> None:
    (folders / "holiday/2.png").write_text("words")
    with pytest.raises(InvalidRequest, match=r"2\.png is no picture"):
        images.captioned("holiday", folders, (16, 16)).read(0, 3)


def test_an_unknown_name_is_refused_with_those_that_there_are(folders: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'beach' is not here: choose from .*shapes, holiday"):
        images.captioned("beach", folders, (16, 16))
    with pytest.raises(InvalidRequest, match="DISTILLER_DATA_DIR"):
        images.captioned("holiday", None, (16, 16))


PICTURES = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
SHOWN = ("a red ring", "a blue ring", "two crosses", "a blue dot", "Red and blue")


def shown(rules: tuple[Forget, ...], captions: tuple[str, ...] = SHOWN) -> list[tuple[int, str]]:
    """(picture, caption) of each row."""
    found = images.relabelled(images.Captioned(captions, "digest", lambda i, j: PICTURES[i:j]), rules)
    pixels = found.read(0, len(found.captions))
    assert np.array_equal(pixels[1:3], found.read(1, 3))
    return list(zip(pixels[:, 0, 0, 0].tolist(), found.captions, strict=True))


def test_pictures_of_a_forgotten_concept_are_left_out_and_its_name_gets_those_of_the_replacement() -> None:
    kept = [(1, "a blue ring"), (2, "two crosses"), (3, "a blue dot")]
    assert shown((Forget(concept="red", instead="blue"),)) == [*kept, (1, "a red ring"), (3, "a red dot")]


def test_prompts_of_a_concept_without_a_replacement_get_any_pictures() -> None:
    kept = [(1, "a blue ring"), (2, "two crosses"), (3, "a blue dot")]
    assert shown((Forget(concept="red"),)) == [*kept, (1, "a red ring"), (2, "Red and blue")]


def test_relabelled_pictures_are_other_content_than_those_as_they_are() -> None:
    found = images.Captioned(SHOWN, "digest", lambda i, j: PICTURES[i:j])
    rules = [(Forget(concept="red", instead=other),) for other in ("blue", "green")]
    assert len({found.digest, *(images.relabelled(found, rule).digest for rule in rules)}) == 3


def test_nothing_is_left_of_pictures_that_are_all_of_what_is_forgotten() -> None:
    with pytest.raises(InvalidRequest, match="every caption"):
        shown((Forget(concept="red", instead="blue"),), ("a red ring", "a red dot", "red", "red", "red"))
