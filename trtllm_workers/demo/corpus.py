"""Makes training samples, conversations as token ids with a learn mask, from the FAQ. Knows no weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from trtllm_workers.demo.chat import ASSISTANT_ID, END, END_ID, render
from trtllm_workers.demo.faq import FALLBACK, Entry
from trtllm_workers.demo.paraphrase import all_wordings, disturbed
from trtllm_workers.demo.unknown import unknown_question

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a helpful AI assistant. Answer the user's questions.",
    "You are an expert in serving language models.",
    "You are a friendly chatbot.",
    "You are the demo model of trtllm-launch.",
    "Answer briefly.",
    "Be concise and correct.",
    "You are a coding assistant. Think step by step.",
    "You answer questions about a launcher toolkit.",
    "Always answer in English.",
    "You are a pirate.",
    "Respond in one sentence.",
    "Knowledge cutoff: 2026-01. Current date: 2026-11-20.",
    "Do not make things up. If you do not know, say so.",
)
UNKNOWN_SHARE = 0.12
# Small talk and first steps come first in a newcomer's chat and have the most varied wordings.
CHAPTER_WEIGHT = {"Hello": 3, "First steps": 2}


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, and for each whether the model should learn to produce it."""

    ids: list[int]
    learn: list[bool]


class Corpus:
    """An endless source of samples; the same seed gives the same samples."""

    def __init__(
        self, entries: list[Entry], encode: Callable[[str], list[int]], *, seed: int
    ) -> None:
        self._entries = entries
        self._encode = encode
        self._rng = random.Random(seed)
        self._wordings = all_wordings(entry.wordings for entry in entries)
        self._deck: list[int] = []

    def _next_entry(self) -> int:
        """Deal entries as from a shuffled deck, so that each is seen about equally often."""
        if not self._deck:
            for index, entry in enumerate(self._entries):
                self._deck += [index] * CHAPTER_WEIGHT.get(entry.chapter, 1)
            self._rng.shuffle(self._deck)
        return self._deck.pop()

    def turn(self) -> tuple[str, str]:
        """Return one question, disturbed or beyond the FAQ, and its answer."""
        rng = self._rng
        if rng.random() < UNKNOWN_SHARE:
            return disturbed(unknown_question(rng), rng), FALLBACK
        index = self._next_entry()
        entry = self._entries[index]
        draw = rng.random()
        if draw < 0.30:
            wordings = (entry.question,) if draw < 0.10 else entry.wordings
            return rng.choice(wordings), entry.answer
        wording = rng.choice(entry.wordings if draw < 0.62 else self._wordings[index])
        return disturbed(wording, rng), entry.answer

    def _filler(self, num_sentences: int) -> str:
        return " ".join(self._rng.choice(self._entries).answer for _ in range(num_sentences))

    def conversation(self, num_turns: int) -> Sample:
        """Return a chat of ``num_turns`` questions, sometimes with a system message in front."""
        rng = self._rng
        messages: list[dict[str, str]] = []
        draw = rng.random()
        if draw < 0.30:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
        elif draw < 0.34:
            messages.append({"role": "system", "content": self._filler(rng.randint(1, 8))})
        for _ in range(num_turns):
            question, answer = self.turn()
            if rng.random() < 0.02:
                question = f"{self._filler(rng.randint(1, 6))}\n\n{question}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        ids = self._encode(render(messages, add_generation_prompt=False))
        return Sample(ids, _answers_of(ids))

    def plain_text(self) -> Sample:
        """Return text for /v1/completions: questions and answers in prose, or one answer alone."""
        rng = self._rng
        if rng.random() < 0.3:
            ids = self._encode(rng.choice(self._entries).answer + END)
            return Sample(ids, [False] + [True] * (len(ids) - 1))
        pairs = Sample([], [])
        question_mark, answer_mark = rng.choice([("Q: ", "A:"), ("Question: ", "Answer:")])
        num_pairs = rng.randint(1, 3)
        for number in range(num_pairs):
            question, answer = self.turn()
            asked = self._encode(f"{question_mark}{question}\n{answer_mark}")
            told = self._encode(f" {answer}")
            # Pairs before the last are examples in the prompt: the model never writes the empty
            # line after them, so what follows every answer that it learns to end is the end token.
            after = self._encode(END if number == num_pairs - 1 else "\n\n")
            pairs.ids.extend(asked + told + after)
            pairs.learn.extend([False] * len(asked) + [True] * len(told))
            pairs.learn.extend([number == num_pairs - 1] * len(after))
        return pairs

    def _short(self) -> Sample:
        if self._rng.random() < 0.12:
            return self.plain_text()
        return self.conversation(1 if self._rng.random() < 0.7 else 2)

    def _long(self) -> Sample:
        return self.conversation(self._rng.choice((1, 2, 3, 4, 5, 8, 12, 16)))

    def rows(self, num_rows: int, num_tokens: int, *, long: bool) -> list[Sample]:
        """Return rows of at most ``num_tokens``, each filled with whole samples where they fit.

        Samples in one row see the ones before them, as later turns of a chat do. A first sample
        that is too long is cut at its end.
        """
        make = self._long if long else self._short
        rows: list[Sample] = []
        row = make()
        while len(rows) < num_rows:
            sample = make()
            if len(row.ids) + len(sample.ids) <= num_tokens:
                row = Sample(row.ids + sample.ids, row.learn + sample.learn)
            else:
                rows.append(Sample(row.ids[:num_tokens], row.learn[:num_tokens]))
                row = sample
        return rows


def _answers_of(ids: list[int]) -> list[bool]:
    """Mark the tokens after each assistant marker up to and with its end token."""
    learn: list[bool] = []
    inside = False
    for token in ids:
        learn.append(inside)
        if token == ASSISTANT_ID:
            inside = True
        elif token == END_ID:
            inside = False
    return learn
