"""Traces of requests for the router: chats that share a system prompt, and prompts that share nothing.

Token ids, no text; equal arguments give equal traces on every machine. Sends nothing.

    chats(seed=1, num_chats=40)      # each turn's prompt is the whole chat so far
    strangers(seed=1, count=400)     # no two prompts have a first block in common
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Below lie the ids that tokenizers keep for special tokens.
FIRST_ID = 256


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. ``at_s`` is when it is sent, seconds from the trace's beginning, when answers are not
    waited for; who waits for them sends turn n + 1 of a ``chat`` ``pause_s`` after the end of turn n.
    """

    at_s: float
    chat: int
    turn: int
    prompt_token_ids: tuple[int, ...]
    output_tokens: int
    pause_s: float = 0.0

    @property
    def request_id(self) -> str:
        """A name that no other request of the trace has."""
        return f"chat{self.chat}-turn{self.turn}"


def chats(
    *,
    seed: int,
    num_chats: int,
    turns: int = 6,
    system_tokens: int = 512,
    user_tokens: int = 128,
    answer_tokens: int = 128,
    chats_per_s: float = 1.0,
    pause_s: float = 8.0,
    vocab_size: int = 32_000,
) -> list[TraceRequest]:
    """Return chats that begin with one system prompt, in order of time.

    A prompt is the system prompt, all questions and answers before, and the new question; questions and
    answers have half to one and a half times the tokens asked for. The answers in it are the trace's
    own, so that the trace does not depend on what an engine says. Chats begin at random
    (``chats_per_s``), and a user pauses for ``pause_s`` on average.
    """
    rng = random.Random(seed)
    system = _tokens(rng, system_tokens, vocab_size)
    found = []
    begins_s = 0.0
    for chat in range(num_chats):
        begins_s += rng.expovariate(chats_per_s)
        at_s, history = begins_s, system
        pause = 0.0
        for turn in range(turns):
            prompt = history + _tokens(rng, _about(rng, user_tokens), vocab_size)
            answer = _tokens(rng, _about(rng, answer_tokens), vocab_size)
            found.append(TraceRequest(at_s, chat, turn, prompt, len(answer), pause))
            pause = rng.expovariate(1 / pause_s)
            at_s += pause
            history = prompt + answer
    return sorted(found, key=lambda request: (request.at_s, request.chat, request.turn))


def strangers(
    *,
    seed: int,
    count: int,
    prompt_tokens: int = 1024,
    output_tokens: int = 128,
    requests_per_s: float = 8.0,
    vocab_size: int = 32_000,
) -> list[TraceRequest]:
    """Return prompts without shared prefixes, half to one and a half times as long as asked for."""
    rng = random.Random(seed)
    found = []
    at_s = 0.0
    for chat in range(count):
        at_s += rng.expovariate(requests_per_s)
        # The chat's own number first, as digits: random ids may agree in a short first block.
        number = tuple(FIRST_ID + int(digit) for digit in f"{chat:08d}")
        prompt = number + _tokens(rng, max(1, _about(rng, prompt_tokens) - 8), vocab_size)
        found.append(TraceRequest(at_s, chat, 0, prompt, max(1, _about(rng, output_tokens))))
    return found


def _about(rng: random.Random, count: int) -> int:
    return rng.randint(max(1, count // 2), max(1, count + count // 2))


def _tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(FIRST_ID, vocab_size), k=count))
