"""A tiny model with eyes for the simulator and the stand-in for TensorRT-LLM, and requests with images as a
worker gets them. Its tower has no weights; its tokenizer puts <s> before every text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.fakes.tiny_models import make_tiny_checkpoint
from trtllm_workers.config.vision_model import read_vision
from trtllm_workers.engines.base import Engine
from trtllm_workers.types import GenerateRequest, MediaItem, MediaKind, SamplingParams

HIDDEN, PAD = 64, 300
_FastTokenizer: Any = PreTrainedTokenizerFast  # typed in part only
PLACEHOLDER = "<image>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}; {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_seeing_model(folder: Path, family: str = "llava_next", **config: Any) -> Path:
    """Write a language model with the config of one that sees, and a tokenizer that puts <s> first."""
    make_tiny_checkpoint(folder, hidden_size=HIDDEN)
    text = json.loads((folder / "config.json").read_text())
    whole = {
        "model_type": family,
        "image_token_index": PAD,
        "image_token_id": PAD,
        "torch_dtype": "float32",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        **config,
    }
    if family.startswith("qwen2"):
        whole["vision_config"] = {"patch_size": 14, "spatial_merge_size": 2}
    (folder / "config.json").write_text(json.dumps(whole))
    _tokenizer().save_pretrained(str(folder))
    return folder


def _tokenizer() -> Any:
    letters = {
        letter: 10 + at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    specials = {"<s>": 0, "</s>": 1}
    tokenizer = Tokenizer(models.BPE(vocab={**specials, **letters, PLACEHOLDER: PAD}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(one, special=True) for one in ("<s>", "</s>", PLACEHOLDER)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return _FastTokenizer(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def tokenizer_of(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def asked(
    folder: Path,
    name: str,
    *items: MediaItem,
    content: str | None = None,
    max_tokens: int = 8,
    **more: Any,
) -> GenerateRequest:
    """Return a request as the ingress makes it: rendered, tokenized, placeholders expanded."""
    tokenizer = tokenizer_of(folder)
    vision = read_vision(folder)
    assert vision is not None
    pad, placeholder = vision.image_token_id, vision.placeholder
    text = content if content is not None else "look: " + " and ".join([placeholder] * len(items))
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": text},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = []
    media: list[MediaItem] = []
    for token in tokenizer(rendered, add_special_tokens=False).input_ids:
        if token == pad and len(media) < len(items):
            item = items[len(media)]
            media.append(msgspec.structs.replace(item, offset=len(ids)))
            ids += [pad] * item.num_tokens
        else:
            ids.append(token)
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=ids,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        media=tuple(media),
        prompt_text=rendered,
        **more,
    )


def pixels_of(color: tuple[int, int, int], height: int, width: int) -> memoryview:
    return memoryview(bytes(color) * (height * width))


def keep_image(
    engine: Engine,
    name: bytes,
    color: tuple[int, int, int] = (255, 0, 0),
    height: int = 30,
    width: int = 50,
) -> MediaItem:
    """Let the engine's encoder make an item of an image, and keep it."""
    encoder = engine.encoder
    assert encoder is not None
    plan = encoder.plan(height, width)
    item = MediaItem(
        name * 16,
        0,
        plan.num_tokens,
        plan.grid,
        kind=plan.kind,
        num_bytes=plan.num_bytes,
        size=(height, width),
    )
    pixels = pixels_of(color, height, width)
    _keep(engine, item, lambda into: encoder.encode(pixels, height, width, into))
    return item


def keep_rows(
    engine: Engine, name: bytes, rows: torch.Tensor, grid: tuple[int, int, int] | None = None
) -> MediaItem:
    """Keep precomputed embeddings."""
    content = rows.contiguous().view(torch.uint8).numpy().tobytes()
    item = MediaItem(
        name * 16, 0, rows.shape[0], grid, kind=MediaKind.EMBEDDINGS, num_bytes=len(content)
    )

    def fill(into: list[memoryview]) -> None:
        at = 0
        for piece in into:
            piece[:] = content[at : at + len(piece)]
            at += len(piece)

    _keep(engine, item, fill)
    return item


def move(item: MediaItem, source: Engine, target: Engine) -> None:
    """Bring an item's bytes to another worker."""
    store = source.media_store
    assert store is not None
    kept = store.pin(item.digest)
    assert kept is not None
    content = b"".join(store.bytes_of(kept))
    store.unpin(kept)

    def fill(into: list[memoryview]) -> None:
        at = 0
        for piece in into:
            piece[:] = content[at : at + len(piece)]
            at += len(piece)

    _keep(target, item, fill)


def _keep(engine: Engine, item: MediaItem, fill: Callable[[list[memoryview]], None]) -> None:
    store = engine.media_store
    assert store is not None
    claim = store.claim(item.num_bytes)
    fill(claim.runs)
    store.unpin(store.commit(claim, item))
