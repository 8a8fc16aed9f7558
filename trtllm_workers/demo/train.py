# ruff: noqa: T201  (a training script tells its progress on the terminal)
"""Trains the demo model on `faq.md` and measures it. Knows nothing of engines or servers.

    python -m trtllm_workers.demo.train --out trtllm_workers/demo/model

The steps: read the FAQ, train the tokenizer, train the model on endless rewordings, save it in the
Hugging Face layout in bf16, load that again and measure greedy answers. Needs torch, transformers
and safetensors. The same seed, thread count and torch build give the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from trtllm_workers.demo import demo_model_path
from trtllm_workers.demo.chat import END_ID, PAD_ID, render, save_tokenizer, train_tokenizer
from trtllm_workers.demo.corpus import Corpus, Sample
from trtllm_workers.demo.evaluate import evaluate
from trtllm_workers.demo.faq import FALLBACK, Entry, load_faq
from trtllm_workers.demo.paraphrase import all_wordings
from trtllm_workers.demo.unknown import UNKNOWN_QUESTIONS

VOCAB_SIZE = 1536
MAX_POSITIONS = 2048
WARMUP_STEPS = 50
# A batch is these (rows, tokens, long chats) together. oneDNN compiles kernels for each new shape,
# so few fixed shapes train several times as fast as rows cut to the length of their text.
SHAPES = ((24, 128, False), (1, MAX_POSITIONS, True))


def new_model() -> LlamaForCausalLM:
    """Return an untrained model; every size is a multiple of 32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, which learns in few steps, and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def as_tensors(rows: list[Sample], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return ids and targets, right-padded; a target of -100 is not learned."""
    ids = torch.full((len(rows), num_tokens), PAD_ID)
    targets = torch.full((len(rows), num_tokens), -100)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        learned = [t if on else -100 for t, on in zip(row.ids, row.learn, strict=True)]
        targets[at, : len(row.ids) - 1] = torch.tensor(learned[1:])
    return ids, targets


def backward(model: LlamaForCausalLM, batch: list[tuple[Tensor, Tensor]]) -> float:
    """Add the gradient of the mean cross entropy of a batch and return the mean."""
    num_learned = sum(int((targets != -100).sum()) for _, targets in batch)
    total = 0.0
    for ids, targets in batch:
        # torch's CPU kernel for the backward pass of sdpa is slow on short rows.
        model.config._attn_implementation = "eager" if ids.shape[1] < 200 else "sdpa"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden: Any = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        summed = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
        loss: Any = summed / num_learned
        loss.backward()
        total += loss.item()
    return total


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate's factor: a short warm-up, a plateau, then down to nothing."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return min(1.0, 1.6 * (1.0 - step / steps))


def train(corpus: Corpus, *, steps: int, rate: float) -> LlamaForCausalLM:
    """Train a new model for ``steps`` batches."""
    model = new_model()
    model.train()
    opts = optimizers(model, rate)
    started_s, mean_loss, seen = time.monotonic(), math.nan, 0
    for step in range(steps):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * rate_at(step, steps)
        batch = [
            as_tensors(corpus.rows(num_rows, num_tokens, long=long), num_tokens)
            for num_rows, num_tokens, long in SHAPES
        ]
        loss = backward(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += sum(int((ids != PAD_ID).sum()) for ids, _ in batch)
        mean_loss = loss if math.isnan(mean_loss) else 0.97 * mean_loss + 0.03 * loss
        if step % 50 == 49 or step == steps - 1:
            took_s = time.monotonic() - started_s
            print(
                f"step {step + 1:5d}/{steps}  loss {mean_loss:.4f}  {seen / took_s:6.0f} tok/s  {took_s:4.0f} s",
                flush=True,
            )
    return model


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in bf16 with everything that a server reads beside it."""
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    save_tokenizer(tokenizer, out, MAX_POSITIONS)
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def tokenizer_texts(entries: list[Entry]) -> list[str]:
    """Return what the tokenizer is trained on: answers count more than the many wordings."""
    wordings = [w for each in all_wordings(e.wordings for e in entries) for w in each[:8]]
    lowered = [wording.lower() for wording in wordings]
    answers = [entry.answer for entry in entries] + [FALLBACK]
    return answers * 8 + wordings + lowered + [q.strip() for q in UNKNOWN_QUESTIONS]


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description="Train the demo model on faq.md.")
    parser.add_argument("--out", type=Path, default=demo_model_path(), help="where to write it")
    parser.add_argument("--seed", type=int, default=1, help="of weights and samples (default 1)")
    parser.add_argument("--steps", type=int, default=800, help="number of batches (default 800)")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    entries = load_faq()
    tokenizer = train_tokenizer(tokenizer_texts(entries), VOCAB_SIZE)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    lengths = [len(encode(entry.answer)) for entry in entries]
    print(
        f"{len(entries)} questions; answers of {sum(lengths) / len(lengths):.0f} tokens on average,"
    )
    print(f"{max(lengths)} at most; vocabulary {tokenizer.get_vocab_size()}")
    asked = [{"role": "user", "content": entries[0].question}]
    print("a prompt:", render(asked, add_generation_prompt=True))

    corpus = Corpus(entries, encode, seed=options.seed)
    started_s = time.monotonic()
    model = train(corpus, steps=options.steps, rate=options.rate)
    print(f"trained {model.num_parameters():,} parameters in {time.monotonic() - started_s:.0f} s")
    save(model, tokenizer, options.out)
    for line in evaluate(options.out, seed=options.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
