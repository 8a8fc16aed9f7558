"""Prompts of an exact number of tokens, as the server counts them, each beginning with other words.

::

    "Words:" + the shared prefix, the same in all prompts + words drawn for this prompt alone
    └─ base_tokens: chat template and these ─┘

The words are some whose number of tokens is known: found in the tokenizer's vocabulary where its folder
can be read, else by asking the server. Either way the server has the last word.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from trtllm_workers.bench.answer import error_of
from trtllm_workers.bench.client import CHAT, Client
from trtllm_workers.bench.workload import Workload
from trtllm_workers.errors import ConfigError, StartError

START = "Words:"
# Frequent English words and letters: nearly every tokenizer has most of them as one token.
_COMMON = (
    "a b c d e f g h i j k l m n o p r s t u v w x y the of and to in is it that was for on are as "
    "with his they at be this have from or one had by word but not what all were we when your can "
    "said there use an each which she do how their if will up other about out many then them these "
    "so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who its now find long down day did get come made may part"
)
_REPEATS = 8
_AT_ONCE = 8
_MIN_WORDS = 12
_MAX_WORDS = 2000
_CHECKS = 2
_CORRECTIONS = 3
_LARGEST_CORRECTION = 8  # tokens; more is no seam between words but another way to count
_WORD = re.compile(r"[ĠŀĠ▁]([a-z]{2,12})")
# Fields that keep an answer from ending early, as servers know them.
_TO_THE_END = (("min_tokens", "ignore_eos"), ("ignore_eos",), ("min_tokens",))


@dataclass(frozen=True, slots=True)
class Words:
    """Words with their numbers of tokens, one of them 1 at least; and what every prompt has anyway.

    ``template_tokens`` of ``base_tokens`` are the chat template's.
    """

    tokens: Mapping[str, int]
    base_tokens: int
    template_tokens: int

    def text(self, num_tokens: int, dice: random.Random) -> str:
        """Return words that together have ``num_tokens`` tokens, each with a blank before it."""
        single = [word for word, tokens in self.tokens.items() if tokens == 1]
        if len(single) == len(self.tokens):
            chosen = dice.choices(single, k=num_tokens)
        else:
            words, chosen, left = list(self.tokens), [], num_tokens
            longest = max(self.tokens.values())
            while left >= longest:
                chosen.append(dice.choice(words))
                left -= self.tokens[chosen[-1]]
            chosen += dice.choices(single, k=left)
        return "".join(f" {word}" for word in chosen)


class Prompts:
    """Makes request bodies for one model of one server."""

    def __init__(self, model: str, workload: Workload, words: Words, ending: Sequence[str]) -> None:
        self.words = words
        self.model = model
        self._workload = workload
        self._ending = ending
        shared = random.Random(f"{workload.seed} shared")
        self._shared = START + words.text(workload.shared_prefix, shared)
        own = workload.isl - words.base_tokens - workload.shared_prefix
        if own < 1:
            raise ConfigError(
                f"--isl {workload.isl} is too short: the chat template has {words.base_tokens} "
                f"tokens and the shared prefix {workload.shared_prefix}; raise --isl",
                param="isl",
            )
        self._own_tokens = own

    def text(self, key: str) -> str:
        """Return the prompt of a key; equal keys give equal prompts."""
        dice = random.Random(f"{self._workload.seed} {key}")
        return self._shared + self.words.text(self._own_tokens, dice)

    def ending(self) -> dict[str, Any]:
        """Return the fields that keep an answer from ending before its last token."""
        return _to_the_end(self._ending, self._workload.osl)

    def bodies(self, key: str, count: int, **changes: Any) -> list[bytes]:
        """Return ``count`` streaming chat requests, all different."""
        return [
            self._body(self.text(f"{key} {index}"), stream=True, changes=changes)
            for index in range(count)
        ]

    def _body(self, text: str, *, stream: bool, changes: Mapping[str, Any]) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._workload.osl,
            **self.ending(),
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(body | dict(changes))


async def make_prompts(
    client: Client, model: str, workload: Workload, tokenizer: Path | None = None
) -> tuple[Prompts, list[str]]:
    """Return what makes prompts for this server, and notes for the user.

    Raises ConfigError when the server refuses such requests or no prompt of ``isl`` tokens can be made.
    """
    notes: list[str] = []
    ending: Sequence[str] = ()
    if workload.ignore_eos:
        ending = await _ending(client, model)
        if "ignore_eos" not in ending:
            notes.append(
                "the server refuses ignore_eos: answers may end before --osl tokens, which then "
                "count as failed; --no-ignore-eos takes them as they come"
            )
    base = await _count(client, model, START)
    template = max(0, await _count(client, model, "a") - 1)
    tokens: dict[str, int] = {}
    if tokenizer is not None:
        tokens = _words_of(tokenizer)
        if len(tokens) < _MIN_WORDS:
            notes.append(f"{tokenizer} has no words to use; the server is asked instead")
            tokens = {}
    asked = not tokens
    while True:
        words = Words(await _ask_words(client, model, base) if asked else tokens, base, template)
        prompts = await _checked(client, model, workload, words, ending)
        if prompts is not None:
            return prompts, notes
        if asked:
            raise ConfigError(
                f"no prompt of exactly {workload.isl} tokens can be made for '{model}': the server "
                "counts the same words differently in different places; give --tokenizer DIR",
                param="tokenizer",
            )
        notes.append(f"the server counts otherwise than {tokenizer}; it is asked instead")
        asked = True


async def _checked(
    client: Client, model: str, workload: Workload, words: Words, ending: Sequence[str]
) -> Prompts | None:
    """Return prompts that the server counts as they were meant; None if there are none."""
    for _ in range(_CORRECTIONS):
        prompts = Prompts(model, workload, words, ending)
        texts = [prompts.text(f"check {number}") for number in range(_CHECKS)]
        off = [await _count(client, model, text) - workload.isl for text in texts]
        if not any(off):
            return prompts
        if len(set(off)) > 1 or abs(off[0]) > _LARGEST_CORRECTION:
            return None
        words = replace(words, base_tokens=words.base_tokens + off[0])
    return None


async def _ending(client: Client, model: str) -> Sequence[str]:
    for names in _TO_THE_END:
        status, _ = await _ask(client, model, START, _to_the_end(names, 1))
        if status == 200:
            return names
    return ()


def _to_the_end(names: Sequence[str], num_tokens: int) -> dict[str, Any]:
    return {name: num_tokens if name == "min_tokens" else True for name in names}


async def _ask_words(client: Client, model: str, base: int) -> dict[str, int]:
    tokens: dict[str, int] = {}

    async def ask(word: str) -> None:
        total = await _count(client, model, START + f" {word}" * _REPEATS) - base
        if total > 0 and total % _REPEATS == 0:
            tokens[word] = total // _REPEATS

    words = _COMMON.split()
    for few in (words[at : at + _AT_ONCE] for at in range(0, len(words), _AT_ONCE)):
        await asyncio.gather(*map(ask, few))
    if len(tokens) < _MIN_WORDS or 1 not in tokens.values():
        raise ConfigError(
            f"too few words with a fixed number of tokens were found for '{model}'; "
            "give --tokenizer DIR, the folder with its tokenizer.json",
            param="tokenizer",
        )
    return dict(sorted(tokens.items()))  # in whatever order the answers came


async def _count(client: Client, model: str, text: str) -> int:
    """Return the tokens of a chat with this one message, as billed."""
    status, body = await _ask(client, model, text, {})
    if status != 200:
        raise ConfigError(f"{client.target.url} refuses a request: {error_of(body)}", param="isl")
    try:
        return int(msgspec.json.decode(body)["usage"]["prompt_tokens"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{client.target.url} does not tell usage.prompt_tokens; use another --client",
            param="client",
        ) from None


async def _ask(client: Client, model: str, text: str, more: Mapping[str, Any]) -> tuple[int, bytes]:
    message = {"role": "user", "content": text}
    body = {"model": model, "messages": [message], "max_tokens": 1, "temperature": 0, **more}
    try:
        return await client.fetch("POST", CHAT, msgspec.json.encode(body))
    except OSError as wrong:
        raise StartError(f"{client.target.url} stopped answering: {wrong}") from wrong


def _words_of(folder: Path) -> dict[str, int]:
    """Return single-token words of a tokenizer. Raises ConfigError when it cannot be read."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        # tokenizers raises bare Exceptions for whatever is wrong with a file.
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as wrong:  # noqa: BLE001
        raise ConfigError(
            f"--tokenizer: {path} cannot be read: {wrong}", param="tokenizer"
        ) from None
    found = sorted(
        match.group(1) for piece in tokenizer.get_vocab() if (match := _WORD.fullmatch(piece))
    )
    dice = random.Random(0)
    chosen: Sequence[str] = dice.sample(found, min(len(found), _MAX_WORDS))
    base = len(tokenizer.encode(START, add_special_tokens=False).ids)
    return {
        word: 1
        for word in chosen
        if len(tokenizer.encode(START + f" {word}" * _REPEATS, add_special_tokens=False).ids)
        == base + _REPEATS
    }
