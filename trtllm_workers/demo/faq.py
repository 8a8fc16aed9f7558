"""Reads `faq.md` and `unseen.md` into frozen entries. Knows no tokenizer and no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FAQ_PATH = Path(__file__).resolve().parent / "faq.md"
UNSEEN_PATH = Path(__file__).resolve().parent / "unseen.md"
ALSO = "Also asked:"

FALLBACK = (
    "I am a very small model that knows only this toolkit. "
    "Try asking: What is prefill? How do I start the server? Which engines are there?"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of the FAQ with its other wordings and its answer."""

    chapter: str
    question: str
    also: tuple[str, ...]
    answer: str

    @property
    def wordings(self) -> tuple[str, ...]:
        """The question and its other wordings."""
        return (self.question, *self.also)


def parse_faq(text: str) -> list[Entry]:
    """Split a FAQ in Markdown into entries; the file's introduction says the form."""
    entries: list[Entry] = []
    chapter = ""
    for section in ("\n" + text).split("\n## ")[1:]:
        chapter, _, body = section.partition("\n")
        entries += [_entry(chapter.strip(), part) for part in ("\n" + body).split("\n### ")[1:]]
    return entries


def _entry(chapter: str, text: str) -> Entry:
    question, _, body = text.partition("\n")
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    also = [line for line in lines if line.startswith(ALSO)]
    answer = " ".join(line for line in lines if not line.startswith(ALSO))
    if not question.strip() or not answer:
        raise ValueError(f"chapter {chapter!r}: question {question!r} has no answer")
    others = tuple(
        part.strip() for line in also for part in line[len(ALSO) :].split("|") if part.strip()
    )
    return Entry(chapter, question.strip(), others, answer)


def load_faq(path: Path = FAQ_PATH) -> list[Entry]:
    """Read the FAQ that the demo model learns."""
    return parse_faq(path.read_text(encoding="utf-8"))


def load_unseen(path: Path = UNSEEN_PATH) -> list[tuple[str, str]]:
    """Read pairs of (unseen wording, expected answer)."""
    answers = {entry.question: entry.answer for entry in load_faq()} | {"unknown": FALLBACK}
    text = path.read_text(encoding="utf-8")
    pairs = [_entry("unseen", part) for part in text.split("\n### ")[1:]]
    return [(pair.question, answers[pair.answer]) for pair in pairs]
