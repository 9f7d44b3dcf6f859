"""What of a diffusers directory is published as it stands: its own configs and what tokenizers read, no more."""

import hashlib
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.directory import component, read_json, weight_files
from engines.errors import InvalidManifest
from engines.registry.memory import MemoryRegistry

FOLDERS, SECRET = ("text_encoder",), b'{"secret": 1}'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As much of one as an encoder has."""
    made = tmp_path / "pipeline"
    for folder in ("text_encoder", "tokenizer", "tokenizer_2"):
        (made / folder).mkdir(parents=True)
    (made / "text_encoder" / "config.json").write_text("{}")
    save_file({"w": torch.ones(1)}, made / "text_encoder" / "model.safetensors")
    (made / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (made / "tokenizer_2" / "spiece.model").write_bytes(b"pieces")
    return made


def published(directory: Path) -> dict[str, bytes]:
    registry = MemoryRegistry()
    return {
        name: registry.read_blob(sha) for name, sha in component(directory, "encoder", FOLDERS, registry).files.items()
    }


def test_what_tokenizers_read_is_published_and_the_rest_is_left_out_and_named(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "tokenizer" / "notes.txt").write_text("mine")
    (directory / "tokenizer" / "more").mkdir()
    (directory / "tokenizer" / "id_rsa").symlink_to(tmp_path / "id_rsa")
    with caplog.at_level(logging.WARNING):
        files = published(directory)
    assert files == {"config.json": b"{}", "tokenizer/vocab.json": b'{"a": 0}', "tokenizer_2/spiece.model": b"pieces"}
    [record] = caplog.records
    assert record.getMessage().endswith("tokenizer/id_rsa, tokenizer/more, tokenizer/notes.txt")


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "text_encoder/config.json"])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_link_that_leads_out_of_the_directory_is_refused_before_anything_is_published(
    directory: Path, tmp_path: Path, name: str, by: str
) -> None:
    outside = tmp_path / "outside" / name
    outside.parent.mkdir(parents=True)
    outside.write_bytes(SECRET)
    linked, to = (directory / name, outside) if by == "file" else ((directory / name).parent, outside.parent)
    linked.rename(tmp_path / "away")
    linked.symlink_to(to)
    registry = MemoryRegistry()
    with pytest.raises(InvalidManifest, match=rf"{name} leads to {outside}, .* put a copy there"):
        component(directory, "encoder", FOLDERS, registry)
    assert not registry.has_blob(hashlib.sha256(SECRET).hexdigest())


def test_a_snapshot_in_a_cache_of_huggingface_hub_is_published_through_its_links(
    directory: Path, tmp_path: Path
) -> None:
    """`models--…/snapshots/<commit>` links every file into `models--…/blobs`."""
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    directory.rename(snapshot)
    vocabulary = snapshot / "tokenizer" / "vocab.json"
    vocabulary.rename(blobs / "123")
    vocabulary.symlink_to(Path("../../../blobs/123"))
    assert published(snapshot)["tokenizer/vocab.json"] == b'{"a": 0}'


def test_what_is_no_file_or_too_large_is_refused(directory: Path) -> None:
    vocabulary = directory / "tokenizer" / "vocab.json"
    os.truncate(vocabulary, 64 * 2**20 + 1)  # a hole: it takes no place
    with pytest.raises(InvalidManifest, match="more than 64 MiB"):
        published(directory)
    vocabulary.unlink()
    os.mkfifo(vocabulary)
    with pytest.raises(InvalidManifest, match=r"vocab\.json is no regular file"):
        published(directory)


def test_what_calls_itself_weights_and_is_none_is_refused_before_it_is_published(directory: Path) -> None:
    (directory / "text_encoder" / "model.safetensors").write_bytes(SECRET)
    registry = MemoryRegistry()
    with pytest.raises(InvalidManifest, match=r"model\.safetensors is no safetensors file"):
        component(directory, "encoder", FOLDERS, registry)
    assert not registry.has_blob(hashlib.sha256(SECRET).hexdigest())


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}'])
def test_an_index_without_its_map_is_refused(directory: Path, text: str) -> None:
    (directory / "text_encoder" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidManifest, match=r"index\.json"):
        weight_files(directory / "text_encoder")


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[1]")
    with pytest.raises(InvalidManifest, match="no JSON object"):
        read_json(tmp_path / "model_index.json")
