"""Rewords the questions of the FAQ. Knows no tokenizer and no model."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

# A question of the form on the left may also be asked in the forms on the right.
FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What (?:is|are) (?!in |up)(?P<x>.+)(?<! for)\?",
        (
            "What's {x}?",
            "Explain {x}",
            "Please explain {x}",
            "Can you explain {x}?",
            "Explain to me what {x} is",
            "Tell me about {x}",
            "Tell me what {x} is",
            "Describe {x}",
            "Define {x}",
            "What does {x} mean?",
            "What is meant by {x}?",
            "What is the meaning of {x}?",
            "Do you know what {x} is?",
            "What do you know about {x}?",
            "I want to know what {x} is",
            "What exactly is {x}?",
            "What about {x}?",
            "And what is {x}?",
            "Give me a definition of {x}",
            "I do not understand {x}",
            "How does {x} work?",
            "What is {x} used for?",
            "What is {x} for?",
            "What does {x} do?",
            "What is {x} about?",
            "What is this {x}?",
            "What is the point of {x}?",
            "What is the role of {x}?",
            "Why do we need {x}?",
            "Can you tell me something about {x}?",
            "What should I know about {x}?",
            "I came across {x}, what is that?",
            "{x}: what is it?",
            "What do you mean by {x}?",
            "Help me understand {x}",
            "Let us talk about {x}",
            "Say something about {x}",
            "I have never heard of {x}",
            "information about {x}",
            "{x}?",
            "{x}",
        ),
    ),
    (
        r"What does (?P<x>.+) do\?",
        (
            "What is {x} for?",
            "What is {x} good for?",
            "What does {x} do exactly?",
            "Tell me what {x} does",
            "Explain what {x} does",
            "What can I do with {x}?",
            "What is the purpose of {x}?",
            "Why would I use {x}?",
            "When do I use {x}?",
            "What happens with {x}?",
            "Describe {x}",
        ),
    ),
    (
        r"How do I (?P<x>.+)\?",
        (
            "How can I {x}?",
            "How to {x}?",
            "How do you {x}?",
            "How does one {x}?",
            "How would I {x}?",
            "I want to {x}",
            "I need to {x}",
            "I would like to {x}, how?",
            "Tell me how to {x}",
            "Show me how to {x}",
            "Explain how to {x}",
            "What is the way to {x}?",
            "What do I have to do to {x}?",
            "Please help me to {x}",
            "What must I do to {x}?",
            "What do I need to {x}?",
            "Is there a way to {x}?",
            "Can I {x}?",
            "Which command do I use to {x}?",
            "I am trying to {x}",
            "I do not know how to {x}",
            "{x}",
        ),
    ),
    (
        r"(?:Which|What) (?P<x>[\w -]+) are there\?",
        (
            "List the {x}",
            "List all {x}",
            "Name the {x}",
            "What {x} are there?",
            "Which {x} exist?",
            "What are the {x}?",
            "Show me the {x}",
            "Which {x} can I use?",
            "What {x} do you have?",
        ),
    ),
    (
        r"What is the difference between (?P<x>.+) and (?P<y>.+)\?",
        (
            "{x} versus {y}",
            "{x} vs {y}",
            "{x} vs. {y}?",
            "Compare {x} and {y}",
            "Compare {x} with {y}",
            "How do {x} and {y} differ?",
            "How is {x} different from {y}?",
            "Difference between {x} and {y}?",
            "What distinguishes {x} from {y}?",
        ),
    ),
    (
        r"(?:Can|May) I (?P<x>.+)\?",
        ("Is it possible to {x}?", "Could I {x}?", "Am I able to {x}?", "I would like to {x}"),
    ),
    (
        r"Do I need (?P<x>.+)\?",
        ("Is {x} needed?", "Is {x} necessary?", "Must I have {x}?", "Does it need {x}?"),
    ),
    (
        r"What (?:happens|if) (?:when |if )?(?P<x>.+)\?",
        ("What happens if {x}?", "What happens when {x}?", "What if {x}?", "{x}, what happens?"),
    ),
    (
        r"Why (?P<x>.+)\?",
        (
            "Tell me why {x}",
            "What is the reason: why {x}?",
            "Why exactly {x}?",
            "Do you know why {x}?",
        ),
    ),
    (r"How does (?P<x>.+) work\?", ("Explain how {x} works", "Tell me how {x} works")),
    (r"(?P<x>.+), what now\?", ("{x}", "{x}, what can I do?", "{x}, help", "What do I do: {x}?")),
)

BEFORE = (
    *("Please tell me: ", "Can you tell me: ", "Quick question: ", "Another question: "),
    *("Hi, ", "Hello! ", "Hey, ", "OK, ", "So, ", "And ", "Now ", "Next: ", "Well, "),
    *("I am new here. ", "I have a question. ", "Thanks! ", "Great. ", "I see. ", "Sorry, "),
    *("Q: ", "Question: ", "please, ", "can you say ", "I wonder, ", "Help me: "),
)
CONTEXT = (
    *("I just installed it.", "My boss asked me about this.", "I read about this in the README."),
    *(
        "I am reading the code.",
        "We have a cluster with eight GPUs.",
        "I try to understand serving.",
    ),
    *("We want to use this in production.", "I only have a notebook.", "It is my first day here."),
    *(
        "I have never used this before.",
        "Something I always wanted to know:",
        "Let me ask you this.",
    ),
    *(
        "I am a student.",
        "I work with language models.",
        "We come from another tool.",
        "Good morning.",
    ),
    *(
        "My colleague talked about it.",
        "I saw it in the log.",
        "I am preparing a talk.",
        "Perfect.",
    ),
    *("This is nice.", "I have read the manual but still do not get it.", "I am confused.", "Hmm."),
)
SYNONYMS = {
    "start": ("launch", "run", "bring up"),
    "stop": ("end", "halt", "shut down"),
    "use": ("work with", "take", "employ"),
    "choose": ("pick", "select", "set"),
    "change": ("set", "modify", "adjust"),
    "difference": ("distinction",),
    "server": ("service", "system", "thing"),
    "large": ("big",),
    "need": ("require", "want"),
    "see": ("find", "look at", "view"),
    "happens": ("occurs", "is going on"),
    "explain": ("describe", "clarify"),
    "mean": ("stand for", "say"),
    "model": ("LLM", "checkpoint"),
    "send": ("make", "post"),
    "request": ("query", "call"),
    "answer": ("response", "reply", "output"),
    "variable": ("environment variable", "setting"),
    "config": ("configuration", "settings"),
    "GPU": ("graphics card", "accelerator"),
    "worker": ("worker process",),
    "turn": ("switch",),
    "error": ("failure", "problem"),
    "dies": ("crashes", "fails", "is killed"),
    "what": ("which thing",),
    "What": ("Which thing", "What exactly"),
}
AFTER = (
    *(" Explain it like I am new.", " for beginners", " to me", " in plain words", " quickly"),
    *(
        " please",
        ", please",
        " Thanks!",
        " Please be brief.",
        " In short, please.",
        " In one sentence.",
    ),
    *(" Keep it simple.", " Answer briefly.", " I am a beginner.", " exactly", " here", " then"),
    *(" in this toolkit", " in trtllm-launch", " thank you", " :)", " Explain it to me.", " ??"),
)
DROPPED = frozenset(
    [
        *("a", "an", "the", "is", "are", "do", "does", "i", "to", "of", "in", "for", "it", "me"),
        *("my", "please", "you", "can", "this", "that", "what", "how"),
    ]
)


def _lower_first(text: str) -> str:
    word = text.split(" ", 1)[0]
    return (
        text if word[1:2].isupper() or "/" in word or word == "I" else text[:1].lower() + text[1:]
    )


def reworded(question: str) -> list[str]:
    """Return the question in every form of ``FORMS`` that fits it, itself first."""
    found = [question]
    for pattern, forms in FORMS:
        match = re.fullmatch(pattern, question)
        if match:
            found += [form.format(**match.groupdict()) for form in forms]
    return list(dict.fromkeys(found))


def plain(text: str) -> str:
    """Reduce a wording to what tells it from another: lower case, letters and digits."""
    return " ".join(re.findall(r"[a-z0-9_./+-]*[a-z0-9_+]", text.lower()))


def all_wordings(questions: Iterable[tuple[str, ...]]) -> list[list[str]]:
    """Reword every entry's wordings; a wording that two entries could claim goes to none but its author."""
    entries = list(questions)
    owner: dict[str, int] = {}
    for index, wordings in enumerate(entries):
        for wording in wordings:
            taken = owner.setdefault(plain(wording), index)
            if taken != index:
                raise ValueError(f"{wording!r} is asked by {entries[taken][0]!r} too")
    result: list[list[str]] = []
    for index, wordings in enumerate(entries):
        made = [form for wording in wordings for form in reworded(wording)]
        result.append(
            [form for form in dict.fromkeys(made) if owner.setdefault(plain(form), index) == index]
        )
    return result


def _typo(text: str, rng: random.Random) -> str:
    if len(text) < 12:
        return text
    at = rng.randrange(3, len(text) - 2)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _with_synonym(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    places = [at for at, word in enumerate(words) if word.strip("?,.!") in SYNONYMS]
    if not places:
        return text
    at = rng.choice(places)
    word = words[at].strip("?,.!")
    words[at] = words[at].replace(word, rng.choice(SYNONYMS[word]))
    return " ".join(words)


def disturbed(text: str, rng: random.Random) -> str:
    """Say the same with politeness, other case, other punctuation, or a small mistake."""
    if rng.random() < 0.2:
        text = _with_synonym(text, rng)
    if rng.random() < 0.15:
        text = rng.choice(BEFORE) + _lower_first(text)
    if rng.random() < 0.12:
        text = f"{rng.choice(CONTEXT)} {text}"
    if rng.random() < 0.12:
        text = text.rstrip("?") + rng.choice(AFTER)
    if rng.random() < 0.10:
        words = [
            w for w in text.split() if w.lower().strip("?,") not in DROPPED or rng.random() < 0.5
        ]
        text = " ".join(words) or text
    if rng.random() < 0.12:
        text = _typo(text, rng)
    case = rng.random()
    if case < 0.25:
        text = text.lower()
    elif case < 0.40:
        text = _lower_first(text)
    elif case < 0.42:
        text = text.upper()
    end = rng.random()
    if end < 0.25:
        text = text.rstrip("?!. ") or text
    elif end < 0.32:
        text = text.rstrip("?!. ") + rng.choice(["?", "??", ".", "!", " ?"])
    return text
