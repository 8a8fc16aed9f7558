"""An answer that is sent whole: collects text, then responds once. Knows no worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trtllm_workers.ingress.answer import Answer
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.detokenize import Decoder
from trtllm_workers.ingress.exchange import Exchange
from trtllm_workers.ingress.responses import Scored, Shape

Decode = Callable[[Sequence[int], Decoder], str]


class Collected:
    """The Sink of choices whose text is kept until the end."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._scored: dict[int, list[Scored]] = {}

    def text(self, index: int, text: str, logprobs: Sequence[Scored] | None) -> None:
        """Keep text of one choice."""
        self._texts.setdefault(index, []).append(text)
        self._scored.setdefault(index, []).extend(logprobs or ())

    def end(self, index: int, reason: str, logprobs: Sequence[Scored] | None) -> None:
        """Keep what came with the end of one choice."""
        self._scored.setdefault(index, []).extend(logprobs or ())

    def forget(self, index: int) -> None:
        """Drop a choice's text: it begins anew."""
        self._texts.pop(index, None)
        self._scored.pop(index, None)

    def text_of(self, choice: Choice, decode: Decode) -> str:
        """Return a finished choice's text."""
        if choice.silent:
            return decode(choice.token_ids, choice.decoder)
        return "".join(self._texts.get(choice.index, ()))

    def scored(self, index: int) -> list[Scored]:
        """Return a finished choice's logprobs."""
        return self._scored.get(index, [])


async def respond_whole(
    exchange: Exchange,
    answer: Answer,
    collected: Collected,
    shape: Shape,
    decode: Decode,
    echoes: Sequence[str],
) -> None:
    """Wait until the answer is over and send it. Raises the answer's failure."""
    while not answer.over:
        await exchange.woken()
        if exchange.gone:
            return
    if answer.failure is not None:
        raise answer.failure
    choices = []
    for choice in answer.choices:
        text = echoes[choice.index // answer.choices_per_prompt]
        text += collected.text_of(choice, decode)
        scored = collected.scored(choice.index) if choice.scores else None
        assert choice.finish_reason is not None, "an answer is over when its choices are"
        choices.append(shape.choice(choice.index, text, choice.finish_reason, scored))
    await exchange.respond(200, shape.whole(choices, answer.usage()))
