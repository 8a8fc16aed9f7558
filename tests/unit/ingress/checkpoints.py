"""Small checkpoints and the records of workers that serve them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trtllm_workers.types import (
    Address,
    EngineInfo,
    Role,
    WorkerRecord,
)

CORPUS = [
    "Hello world, how are you today? I am fine, thank you very much.",
    "The quick brown fox jumps over the lazy dog. STOP here and there.",
    "日本語のテキスト、中文字符 한국어 텍스트 🎉🎊👩‍👩‍👧 naïve café",
    "def f(x):\n    return {'a': [1, 2]}\n",
] * 8
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CAPABILITIES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logprobs",
    "logit_bias",
    "guided",
)
MODEL = "test/tiny"
REPLY_TO = Address("127.0.0.1", 1, "ingress", "i1")


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """A Llama-2-like one: metaspace, byte fallback, a leading space that decoding strips."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:2] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # The byte tokens are ordinary ones: only the first three are special.
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [one for one in written["added_tokens"] if one["id"] < 3]
    return Tokenizer.from_str(json.dumps(written))


def write_checkpoint(
    folder: Path, tokenizer: Tokenizer | None = None, chat_template: str | None = CHATML
) -> Path:
    """Write what the ingress reads of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def engine_info(folder: Path, **changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "engine": "fake",
        "model_path": str(folder),
        "model_id": "tiny",
        "block_size": 16,
        "num_blocks": 64,
        "max_seq_len": 512,
        "max_batch_size": 8,
        "max_num_tokens": 512,
        "vocab_size": 400,
        "capabilities": CAPABILITIES,
    }
    return EngineInfo(**{**values, **changes})


def record(folder: Path, worker_id: str = "w0", model: str = MODEL, **info: Any) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        model=model,
        role=Role.AGGREGATED,
        address=Address("127.0.0.1", 2, worker_id, "1"),
        engine=engine_info(folder, **info),
        started_at_s=1_700_000_000.0,
    )
