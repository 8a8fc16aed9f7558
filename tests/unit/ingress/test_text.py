from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from tests.unit.ingress.checkpoints import byte_level_tokenizer, write_checkpoint
from trtllm_workers.errors import ConfigError
from trtllm_workers.ingress.text import load_text_model


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="text") as pool:
        yield pool


async def test_byte_level_models_use_the_fast_encoder_and_a_table(
    checkpoint: Path, tokenizer: Tokenizer, executor: ThreadPoolExecutor
) -> None:
    model = load_text_model(checkpoint, 400, executor)
    assert model.encoder_name == "fastokens"
    assert model.table is not None
    for text in ("Hello world", "日本 🎉", "<|im_start|>user\n", ""):
        expected = tokenizer.encode(text).ids
        assert (await model.encode([text], add_special_tokens=True))[0] == expected
        assert model.decode(expected, model.decoder(skip_special_tokens=False)) == text


async def test_other_models_use_the_tokenizers_own_decoder(
    metaspace_checkpoint: Path, metaspace: Tokenizer, executor: ThreadPoolExecutor
) -> None:
    model = load_text_model(metaspace_checkpoint, 500, executor)
    assert model.table is None
    token_ids = (await model.encode(["Hello world 🦊"], add_special_tokens=True))[0]
    assert token_ids == metaspace.encode("Hello world 🦊").ids
    assert model.decode(token_ids, model.decoder(skip_special_tokens=True)) == "Hello world 🦊"
    fox = metaspace.encode("🦊", add_special_tokens=False).ids
    assert b"".join(map(model.token_bytes, fox)).decode().strip() == "🦊"
    assert model.token_bytes(metaspace.encode("the", add_special_tokens=False).ids[0])[:1] == b" "


def test_an_encoder_that_disagrees_is_not_used(
    checkpoint: Path, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        ids = (0,)

    class Disagrees:
        @staticmethod
        def from_json_str(_source: str) -> Disagrees:
            return Disagrees()

        def no_truncation(self) -> None: ...
        def no_padding(self) -> None: ...
        def encode(self, _text: str, _special: bool) -> Wrong:
            return Wrong()

    monkeypatch.setattr("fastokens._native.Tokenizer", Disagrees)
    assert load_text_model(checkpoint, 400, executor).encoder_name == "tokenizers"


def test_without_the_fast_encoder_the_other_serves(
    checkpoint: Path, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    assert load_text_model(checkpoint, 400, executor).encoder_name == "tokenizers"


async def test_large_prompts_are_encoded_in_a_thread_and_small_ones_are_not(
    checkpoint: Path, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_text_model(checkpoint, 400, executor)
    seen: list[str] = []
    encode = model._encode

    def watched(text: str, special: bool) -> list[int]:
        seen.append(threading.current_thread().name)
        return encode(text, special)

    monkeypatch.setattr(model, "_encode", watched)
    small = (await model.encode(["word " * 10], add_special_tokens=False))[0]
    large = (await model.encode(["word " * 10_000], add_special_tokens=False))[0]
    assert len(large) >= 900 * len(small)
    assert seen[0] == threading.main_thread().name
    assert seen[1].startswith("text")


async def test_the_loop_goes_on_while_a_large_prompt_is_encoded(
    checkpoint: Path, executor: ThreadPoolExecutor
) -> None:
    model = load_text_model(checkpoint, 400, executor)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    (await model.encode(["The quick brown fox. " * 100_000], add_special_tokens=False))[0]
    counting.cancel()
    assert turns > 10


@pytest.mark.parametrize("wrote", [True, False])
async def test_a_prompt_gets_one_beginning_of_text_token(
    tmp_path: Path, executor: ThreadPoolExecutor, wrote: bool
) -> None:
    tokenizer = byte_level_tokenizer()
    bos = "<|endoftext|>"
    bos_id = tokenizer.encode(bos).ids[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    folder = write_checkpoint(tmp_path, tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
    model = load_text_model(folder, 400, executor)
    token_ids = (await model.encode([(bos if wrote else "") + "Hello"], add_special_tokens=True))[0]
    assert token_ids.count(bos_id) == 1
    assert token_ids[0] == bos_id
    without = (await model.encode(["Hello"], add_special_tokens=False))[0]
    assert bos_id not in without


def test_padding_and_truncation_of_the_checkpoint_are_not_for_prompts(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    model = load_text_model(write_checkpoint(tmp_path, tokenizer), 400, executor)
    long = "The quick brown fox jumps over the lazy dog"
    token_ids = asyncio.run(model.encode([long], add_special_tokens=True))[0]
    assert model.decode(token_ids, model.decoder(skip_special_tokens=False)) == long


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; the ingress needs the model's tokenizer.json"),
        (b"", "not a tokenizer file"),
        (b"{}", "not a tokenizer file"),
        (b"\xff\xfe", "not a tokenizer file"),
        (b'{"model": {"type": "BPE"}}', "it has no vocabulary"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}}', "tokenizers cannot load it"),
    ],
)
def test_a_broken_tokenizer_file_is_named(
    tmp_path: Path, executor: ThreadPoolExecutor, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_text_model(tmp_path, 400, executor)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_a_broken_tokenizer_config_is_named(
    tmp_path: Path, tokenizer: Tokenizer, executor: ThreadPoolExecutor
) -> None:
    folder = write_checkpoint(tmp_path, tokenizer)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        load_text_model(folder, 400, executor)


def test_the_modules_of_the_ingress_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, trtllm_workers.ingress.serve;"
        "print([m for m in ('torch', 'transformers', 'mpi4py') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
