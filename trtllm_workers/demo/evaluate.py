"""Measures a saved demo model: how many answers are exactly right. Knows no training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_workers.demo.faq import FALLBACK, Entry, load_faq, load_unseen
from trtllm_workers.demo.paraphrase import reworded
from trtllm_workers.demo.unknown import unknown_question

Messages = list[dict[str, str]]

# Forms that paraphrase.py does not have, for questions of the form "What is ...?".
UNSEEN_FORMS = (
    "Could you describe {x} to me?",
    "I keep reading about {x}. What is it?",
    "give me a short summary of {x}",
    "what's the idea of {x}?",
    "I would love to learn about {x}",
)


class Chat:
    """A checkpoint with its tokenizer, as a server would use them: bf16, chat template."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def prompt(self, messages: Messages) -> str:
        """Render messages with the template of the checkpoint."""
        rendered: str = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def answers(
        self, prompts: Sequence[str], *, temperature: float = 0.0, max_new_tokens: int = 96
    ) -> list[str]:
        """Continue every prompt; an answer that does not end by itself ends in '<no end>'."""
        found: list[str] = []
        for at in range(0, len(prompts), 32):
            inputs = self._tokenizer(
                list(prompts[at : at + 32]),
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
                return_token_type_ids=False,
            )
            sampling: dict[str, Any] = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                if temperature
                else {"do_sample": False}
            )
            out = self._model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
            for row in out[:, inputs["input_ids"].shape[1] :]:
                ended = bool((row == self._model.config.eos_token_id).any())
                text: str = self._tokenizer.decode(row, skip_special_tokens=True)
                found.append(text if ended else text + "<no end>")
        return found

    def num_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt."""
        return len(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _ask(question: str) -> Messages:
    return [{"role": "user", "content": question}]


def _after_others(
    entries: list[Entry], index: int, num_before: int, rng: random.Random
) -> Messages:
    messages: Messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for entry in rng.sample(entries, num_before):
        messages += [*_ask(entry.question), {"role": "assistant", "content": entry.answer}]
    return messages + _ask(entries[index].question)


def cases(chat: Chat, seed: int) -> Iterator[tuple[str, list[tuple[str, str]], float]]:
    """Yield (name, pairs of prompt and right answer, temperature)."""
    rng = random.Random(seed + 1000)
    entries = load_faq()
    plain = [(chat.prompt(_ask(e.question)), e.answer) for e in entries]
    yield "questions of the FAQ", plain, 0.0
    yield "the same at temperature 1", plain, 1.0
    system = {"role": "system", "content": "You are a helpful assistant."}
    yield (
        "the same after a system message",
        [(chat.prompt([system, *_ask(e.question)]), e.answer) for e in entries],
        0.0,
    )
    yield (
        "other wordings of the FAQ",
        [(chat.prompt(_ask(q)), e.answer) for e in entries for q in e.also],
        0.0,
    )
    unseen = [(q, a) for q, a in load_unseen() if a != FALLBACK]
    yield "unseen wordings, by hand", [(chat.prompt(_ask(q)), a) for q, a in unseen], 0.0
    formed = [
        (rng.choice(UNSEEN_FORMS).format(x=e.question[8:-1]), e.answer)
        for e in entries
        if f"Explain {e.question[8:-1]}" in reworded(e.question)
    ]
    yield "unseen wordings, by form", [(chat.prompt(_ask(q)), a) for q, a in formed], 0.0
    for low, high in ((2, 3), (12, 16), (24, 30)):
        late = [
            (chat.prompt(_after_others(entries, i, rng.randint(low, high), rng)), e.answer)
            for i, e in enumerate(entries)
            if i % (2 if high < 10 else 5) == 0
        ]
        lengths = [chat.num_tokens(prompt) for prompt, _ in late]
        yield f"late turns, at {min(lengths)} to {max(lengths)} tokens", late, 0.0
    prose = [(f"Q: {e.question}\nA:", " " + e.answer) for e in entries]
    yield "Q and A in prose, without template", prose, 0.0
    strange = [(q, a) for q, a in load_unseen() if a == FALLBACK]
    strange += [(unknown_question(rng), FALLBACK) for _ in range(50)]
    yield "unknown questions", [(chat.prompt(_ask(q)), a) for q, a in strange], 0.0


def evaluate(folder: Path, *, seed: int = 1, num_wrong: int = 5) -> Iterator[str]:
    """Yield one line per measure, each followed by a few of its wrong answers."""
    torch.manual_seed(seed)
    chat = Chat(folder)
    for name, pairs, temperature in cases(chat, seed):
        answers = chat.answers([prompt for prompt, _ in pairs], temperature=temperature)
        wrong = [(p, a) for (p, right), a in zip(pairs, answers, strict=True) if a != right]
        right_share = 1.0 - len(wrong) / len(pairs)
        yield f"{name}: {right_share:.1%} exactly right of {len(pairs)}"
        for prompt, answer in wrong[:num_wrong]:
            yield f"    {prompt[-90:]!r} -> {answer[:90]!r}"
