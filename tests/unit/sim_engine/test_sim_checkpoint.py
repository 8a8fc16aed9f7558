from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.engines.sim.checkpoint import read_checkpoint
from trtllm_workers.errors import ConfigError

BASE = {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 4}


def folder_with(tmp_path: Path, config: Any, generation: Any = None) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_facts_come_from_config_json(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(folder_with(tmp_path, BASE))
    assert checkpoint.vocab_size == 1024
    assert checkpoint.max_positions == 512
    assert checkpoint.eos_token_ids == (4,)
    assert checkpoint.model_id.startswith("model-")


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(folder_with(tmp_path, BASE, {"eos_token_id": [8, 9]}))
    assert checkpoint.eos_token_ids == (8, 9)
    assert not {4, 8, 9} & set(checkpoint.word_ids)


def test_a_multimodal_config_is_read_from_its_language_model(tmp_path: Path) -> None:
    config = {"eos_token_id": 4, "vocab_size": 7, "text_config": BASE}
    assert read_checkpoint(folder_with(tmp_path, config)).vocab_size == 1024


def test_the_model_id_is_the_same_for_a_copy_and_another_for_another_config(
    tmp_path: Path,
) -> None:
    first = read_checkpoint(folder_with(tmp_path / "a", BASE))
    copy = read_checkpoint(folder_with(tmp_path / "b", BASE))
    other = read_checkpoint(folder_with(tmp_path / "c", {**BASE, "num_hidden_layers": 3}))
    assert first.model_id == copy.model_id != other.model_id


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        # Specials and the 256 single bytes at the beginning (byte-level BPE, SentencePiece).
        ({"vocab_size": 1024, "eos_token_id": 4}, 261, 1023),
        ({"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}, 259, 31999),
        # Specials at the end.
        (
            {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": [128001, 128009]},
            259,
            127999,
        ),
        ({"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}, 259, 151642),
        # Too small to leave the bytes out.
        ({"vocab_size": 64, "eos_token_id": 1}, 3, 63),
        ({"vocab_size": 3, "eos_token_id": None}, 0, 2),
    ],
)
def test_word_ids_leave_special_ids_out(
    tmp_path: Path, config: dict[str, Any], first: int, last: int
) -> None:
    words = read_checkpoint(folder_with(tmp_path, {**BASE, **config})).word_ids
    assert (words[0], words[-1]) == (first, last)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BASE, "vocab_size": None}, r"config\.json: 'vocab_size' must be a positive .* None"),
        ({**BASE, "vocab_size": True}, r"config\.json: 'vocab_size' .* not True"),
        ({**BASE, "max_position_embeddings": 0}, r"config\.json: 'max_position_embeddings'"),
        ({**BASE, "vocab_size": 1, "eos_token_id": 0}, r"leaves no token beside the special"),
        ([], r"config\.json: holds no JSON object"),
    ],
)
def test_an_impossible_config_is_refused_by_key(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(folder_with(tmp_path, config))


def test_a_folder_that_is_no_checkpoint_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{\n"vocab_size": ')
    with pytest.raises(ConfigError, match=r"config\.json:2: no JSON"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_checkpoint(tmp_path)
