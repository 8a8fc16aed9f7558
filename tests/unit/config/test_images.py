"""Settings of images: what the model's config.json decides, what is refused, what has no effect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.images import media_settings, takes_images
from trtllm_workers.config.media import MIB, MediaSettings
from trtllm_workers.config.settings import Settings, resolve
from trtllm_workers.errors import ConfigError

VISION: Mapping[str, Any] = {"model_type": "llava", "vision_config": {"hidden_size": 8}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return made(tmp_path / "vl", VISION)


def made(folder: Path, config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settle(model: Path, *, of_one_part: bool = False, env: dict[str, str] | None = None, **flags: Any) -> Settings:  # fmt: skip
    given = {"model_path": model, "engine": "torch", **flags}
    return resolve(given, {"HOME": "/nowhere", **(env or {})}, of_one_part=of_one_part)


def test_auto_takes_images_when_the_model_has_a_vision_part(model: Path, tmp_path: Path) -> None:
    settings = settle(model)
    assert settings.modality == "multimodal"
    assert settings.sources["modality"] == (
        "default (auto takes multimodal: config.json has vision_config)"
    )
    assert settle(made(tmp_path / "text", {"vocab_size": 9})).modality == "text"
    assert settle(model, modality="text").modality == "text"


@pytest.mark.parametrize("config", [[], "text", {"vision_config": None}, {"vision_config": "x"}])
def test_a_config_without_a_vision_part_takes_no_images(tmp_path: Path, config: object) -> None:
    assert not takes_images(made(tmp_path / "m", config))
    (tmp_path / "m" / "config.json").write_text("{cut")
    assert not takes_images(tmp_path / "m")
    assert not takes_images(tmp_path / "gone")


def test_multimodal_with_a_text_model_is_refused_by_its_config(tmp_path: Path) -> None:
    text = made(tmp_path / "text", {"vocab_size": 9})
    with pytest.raises(ConfigError) as caught:
        settle(text, env={"MODALITY": "multimodal"})
    assert caught.value.param == "modality"
    assert str(caught.value).startswith(
        f"environment MODALITY: multimodal, but the model takes text only: {text}/config.json has no "
        "vision_config; give --model-path"
    )


def test_encode_workers_need_a_vision_tower(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--num-encode-workers: .* vision tower, but the model"):
        settle(made(tmp_path / "text", {}), num_encode_workers="1")
    with pytest.raises(ConfigError, match=r"nothing to do with modality text \(--modality\)"):
        settle(model, num_encode_workers=1, modality="text")
    assert settle(model, num_encode_workers=1).num_encode_workers == 1


def test_limits_are_what_a_worker_is_told(model: Path, tmp_path: Path) -> None:
    assert media_settings(settle(model)) == MediaSettings()
    settings = settle(
        model,
        allowed_local_media_path=str(tmp_path),
        max_file_size_mb="2",
        max_image_pixels="100",
        media_timeout_s="1.5",
        max_images="3",
        media_cache_mb="7",
        env={"MEDIA_URL_HOSTS": "a.example, [::1]:80,", "ALLOW_PICKLE_EMBEDDINGS": "on"},
    )
    assert media_settings(settings) == MediaSettings(
        allowed_local_path=tmp_path,
        max_file_bytes=2 * MIB,
        max_pixels=100,
        url_hosts=("a.example", "[::1]:80"),
        allow_pickle=True,
        timeout_s=1.5,
        max_items=3,
        cache_bytes=7 * MIB,
    )
    assert settings.sources["media_url_host"] == "environment MEDIA_URL_HOSTS"


def test_hosts_of_flags_win_over_the_variable(model: Path) -> None:
    settings = settle(model, media_url_host=("b",), env={"MEDIA_URL_HOSTS": "a"})
    assert settings.media_url_host == ("b",)


@pytest.mark.parametrize(
    "host", ["http://a", "a/b", "user@a", "a:0", "a:70000", "a:b", "", "::1", "a b", "[zz]"]
)
def test_a_host_is_a_host_and_perhaps_a_port(model: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="--media-url-host: must be a host, or host:port"):
        settle(model, media_url_host=(host,))


def test_the_folder_for_local_files_is_one(model: Path, tmp_path: Path) -> None:
    for wrong, why in ((tmp_path / "gone", "does not exist"), (model / "config.json", "is no fol")):
        with pytest.raises(ConfigError, match=f"--allowed-local-media-path: .* {why}"):
            settle(model, allowed_local_media_path=str(wrong))
    assert settle(model).allowed_local_media_path is None
    assert "every file of a worker" in settle(model, allowed_local_media_path="/").warnings[0]


def test_a_relative_folder_is_taken_from_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settle(model, allowed_local_media_path="vl").allowed_local_media_path == model


def test_settings_without_effect_are_pointed_out(model: Path, tmp_path: Path) -> None:
    text = made(tmp_path / "text", {})
    assert settle(text, env={"MAX_FILE_SIZE_MB": "3", "ENCODE_ENGINE_ARGS": "x.yaml"}).warnings == (
        "environment ENCODE_ENGINE_ARGS has no effect: the model takes text only",
        "environment MAX_FILE_SIZE_MB has no effect: the model takes text only",
    )
    assert settle(model, modality="text", max_images=3).warnings == (
        "--max-images has no effect: modality is text (--modality)",
    )
    assert settle(model, encode_cuda_visible_devices="2").warnings == (
        "--encode-cuda-visible-devices has no effect: no encode worker is started "
        "(--num-encode-workers)",
    )
    assert settle(text, kv_transport="tcp").warnings == (
        "--kv-transport has no effect without --disaggregated: the model takes text only",
    )
    assert settle(model, kv_transport="tcp").warnings == ()
    assert settle(text, max_images=3, of_one_part=True).warnings == ()


def test_the_engine_config_of_encode_workers_is_a_file(model: Path) -> None:
    assert settle(model).encode_engine_config is not None
    with pytest.raises(ConfigError, match=r"ENCODE_ENGINE_ARGS: 'gone.yaml' does not exist"):
        settle(model, num_encode_workers=1, env={"ENCODE_ENGINE_ARGS": "gone.yaml"})
    with pytest.raises(ConfigError, match="names a device twice"):
        settle(model, num_encode_workers=1, encode_cuda_visible_devices="1,1")
