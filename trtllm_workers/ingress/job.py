"""What one request's choices are made from, also when one has to be made anew.

Knows the checked request and the model's text side; sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.detokenize import Decoder
from trtllm_workers.ingress.exchange import Exchange
from trtllm_workers.ingress.images import Images
from trtllm_workers.ingress.openai import Ask
from trtllm_workers.ingress.responses import Shape
from trtllm_workers.ingress.served import Served
from trtllm_workers.ingress.sse import Path, Wire, direct_path, risk
from trtllm_workers.ingress.stops import StopMatcher
from trtllm_workers.ingress.text import TextModel
from trtllm_workers.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way: what was asked, of which model, with which images."""

    ask: Ask
    served: Served
    text: TextModel
    images: Images | None = None

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """Return a new decoder; a completion goes on with its prompt's text, a chat does not."""
        continues = prompt if not self.ask.chat else ()
        return self.text.decoder(skip_special_tokens=self.ask.skip_special_tokens, prompt=continues)

    def matcher(self) -> StopMatcher | None:
        """Return a new matcher of the request's stop strings, if it has any."""
        stop = self.ask.stop
        return StopMatcher(stop, include=self.ask.include_stop) if stop else None

    def echo(self, prompt: Sequence[int]) -> str:
        """Return the prompt's text when the request wants it back."""
        return self.text.decode(prompt, self.decoder(())) if self.ask.echo else ""

    @property
    def may_start_over(self) -> bool:
        """True while nobody sees the answer before its end."""
        return not self.ask.stream

    @property
    def may_go_on(self) -> bool:
        """True when prompt plus tokens so far, as a new prompt, is still the same request.

        Not when something counts output tokens: they would have become prompt. Not when a seeded
        series of draws would begin again. Greedy draws nothing. Not when the answer is guided: what
        has been matched so far is known to the old worker alone.
        """
        fields = self.ask.fields
        if "guided" in fields:
            return False
        draws = "seed" in fields and fields.get("temperature") != 0
        return not (draws or "presence_penalty" in fields or "frequency_penalty" in fields)

    def opening(self, shape: Shape, num_choices: int, echoes: Sequence[str]) -> bytes:
        """Return the events before the first token: who speaks, or the prompt that is echoed."""
        if shape.chat:
            return b"".join(map(shape.role_event, range(num_choices)))
        return b"".join(
            shape.text_event(index, echoes[index // self.ask.n], None)
            for index in range(num_choices)
            if echoes[index // self.ask.n]
        )

    def direct(self, wire: Wire, exchange: Exchange, shape: Shape, choice: Choice) -> Path | None:
        """Return the shortest way of a choice's tokens to its client, where there is one."""
        table = self.text.table
        connection = exchange.connection
        if table is None or connection is None or self.ask.logprobs is not None:
            return None
        return direct_path(choice, wire, connection, shape, table.fragments, risk(self.ask.stop))


def rest_of(request: GenerateRequest, token_ids: list[int]) -> GenerateRequest | None:
    """Return the request for what is still missing after ``token_ids``; None when nothing is.

    Its images stay where they were: the old prompt is the new one's beginning.
    """
    sampling = request.sampling
    left = sampling.max_tokens - len(token_ids)
    if left <= 0:
        return None
    return msgspec.structs.replace(
        request,
        prompt_token_ids=request.prompt_token_ids + token_ids,
        sampling=msgspec.structs.replace(
            sampling,
            max_tokens=left,
            min_tokens=max(0, sampling.min_tokens - len(token_ids)),
        ),
    )
