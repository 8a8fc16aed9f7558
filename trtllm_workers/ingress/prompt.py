"""From a checked request to token ids and limits. Knows the model's text side, no worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_workers.errors import ContextTooLong, NotSupported, RequestError
from trtllm_workers.ingress.openai import Ask
from trtllm_workers.ingress.placeholders import expand, refuse_tokens, refuse_written
from trtllm_workers.ingress.text import TextModel
from trtllm_workers.types import MediaItem, VisionInfo

# What OpenAI's completions endpoint generates when max_tokens is not given.
DEFAULT_COMPLETION_TOKENS = 16

Items = Sequence[Sequence[MediaItem]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready to be sent. ``text`` is there with ``media`` only, see GenerateRequest."""

    token_ids: list[int]
    media: tuple[MediaItem, ...] = ()
    text: str = ""

    @property
    def image_tokens(self) -> int:
        """How many of the tokens stand for images."""
        return sum(item.num_tokens for item in self.media)


async def tokenize(
    ask: Ask,
    text: TextModel,
    *,
    vocab_size: int,
    max_seq_len: int,
    vision: VisionInfo | None = None,
    items: Items = (),
) -> list[Prompt]:
    """Return every prompt. Raises RequestError naming the field.

    ``vision`` is what the model's workers know of images, and ``items`` what each image of the request
    became. Ids of a prompt that is longer than ``max_seq_len`` are not looked at: ``budget`` refuses it.
    """
    _check_ids(ask, vocab_size)
    if items:
        assert vision is not None, "only a model that knows images is sent any"
        return [await _with_images(ask, text, vision, items)]
    if vision is not None:
        refuse_written(ask, vision.placeholder)
    prompts = await _token_ids(ask, text, vocab_size, max_seq_len)
    if vision is not None:
        for prompt in prompts:
            refuse_tokens(ask, prompt, vision)
    return [Prompt(prompt) for prompt in prompts]


async def _with_images(ask: Ask, text: TextModel, vision: VisionInfo, items: Items) -> Prompt:
    rendered = render(ask, text, [len(of_one) for of_one in items])
    [token_ids] = await text.encode([rendered], add_special_tokens=False)
    in_order = [item for of_one in items for item in of_one]
    expanded, media = expand(ask, token_ids, in_order, vision)
    return Prompt(expanded, media, rendered)


async def _token_ids(
    ask: Ask, text: TextModel, vocab_size: int, max_seq_len: int
) -> list[list[int]]:
    if ask.chat:
        # The template writes the beginning-of-text token itself where the model wants one.
        return await text.encode([render(ask, text)], add_special_tokens=False)
    texts = [prompt for prompt in ask.prompts if isinstance(prompt, str)]
    if texts:
        prompts = await text.encode(texts, add_special_tokens=True)
    else:
        prompts = [prompt for prompt in ask.prompts if isinstance(prompt, list)]
        for prompt in prompts:
            if len(prompt) <= max_seq_len:
                _check_prompt_ids(prompt, vocab_size)
    if not all(prompts):
        raise RequestError("prompt is empty: it has no tokens", param="prompt")
    return prompts


def _check_prompt_ids(prompt: Sequence[int], vocab_size: int) -> None:
    for token_id in (min(prompt, default=0), max(prompt, default=0)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt: {token_id} is no token id; the vocabulary has {vocab_size}",
                param="prompt",
            )


def render(ask: Ask, text: TextModel, image_counts: Sequence[int] = ()) -> str:
    """Return the prompt text of a chat; see ChatTemplate.render. Raises RequestError."""
    template = text.template
    if template is None:
        raise RequestError(
            f"model '{ask.model}' has no chat template; use /v1/completions", param="messages"
        )
    messages: Sequence[dict[str, Any]] = ask.messages
    if any(message["role"] == "developer" for message in messages) and not template.knows_developer:
        # OpenAI's newer name for the same thing; the template only knows the older one.
        messages = [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]
    if not template.knows_name:
        for at, message in enumerate(messages):
            if "name" in message:
                raise NotSupported(
                    f"messages[{at}].name: the chat template of '{ask.model}' does not use names",
                    param=f"messages[{at}].name",
                )
    return template.render(
        messages,
        add_generation_prompt=ask.add_generation_prompt,
        continue_final_message=ask.continue_final_message,
        variables=ask.template_variables,
        image_counts=image_counts,
    )


def budget(ask: Ask, prompt: Prompt, max_seq_len: int, max_prompt_len: int = 0) -> int:
    """Return how many tokens may be generated for ``prompt``. Raises ContextTooLong.

    ``max_prompt_len`` 0: prompts have no limit of their own.
    """
    length = len(prompt.token_ids)
    if 0 < max_prompt_len < length:
        raise ContextTooLong(
            f"the prompt has {_tokens(prompt)}, and the workers of '{ask.model}' take at most "
            f"{max_prompt_len}: a longer prompt does not fit the buffer that moves its KV from a "
            "prefill to a decode worker; shorten the prompt (the operator can raise "
            "cache_transceiver_config.max_tokens_in_buffer in the engine configs of both roles)",
            param="messages" if ask.chat else "prompt",
        )
    left = max_seq_len - length
    if left < 1:
        raise ContextTooLong(
            f"the prompt has {_tokens(prompt)}, and this model's context of {max_seq_len} "
            "leaves none for an answer; shorten the prompt",
            param="messages" if ask.chat else "prompt",
        )
    if ask.max_tokens is None:
        return left if ask.chat else min(DEFAULT_COMPLETION_TOKENS, left)
    if ask.max_tokens > left:
        raise ContextTooLong(
            f"the prompt has {_tokens(prompt)}{',' if prompt.media else ''} and max_tokens is {ask.max_tokens}: together "
            f"{length + ask.max_tokens}, but this model's context is {max_seq_len}; shorten "
            f"the prompt or ask for at most {left}",
            param="max_tokens",
        )
    return ask.max_tokens


def _tokens(prompt: Prompt) -> str:
    if not prompt.media:
        return f"{len(prompt.token_ids)} tokens"
    return f"{len(prompt.token_ids)} tokens, of which {prompt.image_tokens} stand for images"


def _check_ids(ask: Ask, vocab_size: int) -> None:
    named = {
        "stop_token_ids": ask.fields.get("stop_token_ids", ()),
        "logit_bias": [token for token, _ in ask.fields.get("logit_bias", ())],
    }
    for field, token_ids in named.items():
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{field}: {token_id} is no token id; the vocabulary has {vocab_size}",
                    param=field,
                )
