"""``embed``: what it refuses before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from trtllm_workers.cli.main import group
from trtllm_workers.errors import ConfigError

Embed = Callable[..., None]


@pytest.fixture
def embed(tmp_path: Path) -> Embed:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"vocab_size": 9}))
    (tmp_path / "a.png").write_bytes(b"png")

    def call(*words: str) -> None:
        environ = {"MODEL_PATH": str(tmp_path / "text")}
        done = CliRunner(env=environ).invoke(group, ["embed", *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        raise AssertionError(done.output)

    return call


def test_a_text_model_is_refused_by_the_name_of_what_it_lacks(embed: Embed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text takes text only: its config\.json has no vision_"):
        embed(str(tmp_path / "a.png"), "-o", str(tmp_path / "a.safetensors"))


def test_a_file_that_exists_is_kept_without_force(embed: Embed, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    out.write_text("precious")
    with pytest.raises(ConfigError, match=r"a\.safetensors exists; --force writes over it"):
        embed(str(tmp_path / "a.png"), "-o", str(out))
    with pytest.raises(ConfigError, match="takes text only"):  # which comes next
        embed(str(tmp_path / "a.png"), "-o", str(out), "--force")
    assert out.read_text() == "precious"


def test_output_is_a_safetensors_file_or_a_folder(embed: Embed, tmp_path: Path) -> None:
    picture = str(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, or a folder"):
        embed(picture, "-o", str(tmp_path / "a.pt"))
    with pytest.raises(ConfigError, match=r"there is no folder .*gone"):
        embed(picture, "-o", str(tmp_path / "gone" / "a.safetensors"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.jpg").write_bytes(b"jpg")
    with pytest.raises(ConfigError, match=r"two images would become .*a\.safetensors"):
        embed(picture, str(tmp_path / "b" / "a.jpg"), "-o", str(tmp_path))


def test_images_are_files_and_not_embeddings(embed: Embed, tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"gone\.png does not exist"):
        embed(str(tmp_path / "gone.png"), "-o", out)
    with pytest.raises(ConfigError, match="is a folder"):
        embed(str(tmp_path), "-o", out)
    (tmp_path / "e.PT").write_bytes(b"")
    with pytest.raises(ConfigError, match="embeddings by its name"):
        embed(str(tmp_path / "e.PT"), "-o", out)
