"""Images and embeddings as TensorRT-LLM takes them: with the prompt's text, never with token ids.

What ``default_multimodal_input_loader`` would return is made here from the prompt that was rendered: the
loader takes one text, puts it into the chat template as the only message of a user, and loads the model's
processor on every call. So roles and earlier messages would be lost, and each request would wait for files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_workers.config.vision_model import VALUE_BYTES
from trtllm_workers.engines.acceptance import pin_media, unpin_media
from trtllm_workers.engines.trtllm.entries import Entry
from trtllm_workers.engines.trtllm.media_api import MediaApi
from trtllm_workers.errors import EngineError, RequestError
from trtllm_workers.transfer.media_store import Entry as Kept
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import GenerateRequest, MediaKind, VisionInfo

_GENERATION_ONLY = "generation_only"


class MediaPrompts:
    """Makes TensorRT-LLM's inputs of requests with media, and holds their bytes for as long.

    ``first_text`` is what its tokenizer puts before a prompt by itself; rendered prompts begin with it
    already, and it must not be there twice.
    """

    def __init__(
        self, api: MediaApi, vision: VisionInfo, store: MediaStore, first_text: str
    ) -> None:
        self._api = api
        self._vision = vision
        self._store = store
        self._first_text = first_text

    def check(self, request: GenerateRequest) -> None:
        """Raise RequestError unless the prompt's text has a place for every image."""
        count = request.prompt_text.count(self._vision.placeholder)
        if count != len(request.media):
            raise RequestError(
                f"the prompt's text holds {self._vision.placeholder!r} {count} times for "
                f"{len(request.media)} images",
                param="media",
            )

    def hold(self, entry: Entry) -> dict[str, Any]:
        """Return a request's text with its images, whose bytes are pinned from now on. Raises EngineError."""
        entry.pinned = pin_media(entry.request, self._store)
        try:
            return self.inputs(entry.request, entry.pinned)
        except BaseException:
            self.let_go(entry)
            raise

    def let_go(self, entry: Entry) -> None:
        """Unpin what a request holds."""
        pinned, entry.pinned = entry.pinned, []
        unpin_media(self._store, pinned)

    def inputs(self, request: GenerateRequest, pinned: Sequence[Kept]) -> dict[str, Any]:
        """Return a prompt's text with its images, over the store's own memory where that can be."""
        entries = zip(request.media, pinned, strict=True)
        text = request.prompt_text.removeprefix(self._first_text)
        if request.media[0].kind is MediaKind.IMAGE:
            pictures = [
                self._api.picture(item.size, _whole(self._store, entry)) for item, entry in entries
            ]
            return {"prompt": text, "multi_modal_data": {"image": pictures}}
        rows = [self._rows(entry, item.num_tokens) for item, entry in entries]
        return {"prompt": text, "multi_modal_embeddings": {"image": rows}}

    def _rows(self, entry: Kept, num_tokens: int) -> Any:
        """Return embeddings [num_tokens, hidden], over the store's own memory where it is one piece."""
        torch, vision = self._api.torch, self._vision
        expected = num_tokens * vision.hidden_size * VALUE_BYTES[vision.dtype]
        if entry.item.num_bytes != expected:
            raise EngineError(
                f"embeddings of {num_tokens} tokens have {entry.item.num_bytes} bytes, where "
                f"{expected} make {vision.hidden_size} values of {vision.dtype} each"
            )
        flat = torch.frombuffer(_whole(self._store, entry), dtype=getattr(torch, vision.dtype))
        return flat.view(num_tokens, vision.hidden_size)


def wrong_length(request: GenerateRequest, result: Any) -> str:
    """Return what is wrong when TensorRT-LLM's prompt is not as long as the one that was counted, else ""."""
    made, counted = len(result.prompt_token_ids or ()), len(request.prompt_token_ids)
    if made == counted:
        return ""
    return f"request {request.request_id}: its prompt has {made} tokens in TensorRT-LLM and {counted} by our count"


def needs_media(request: GenerateRequest, request_type: str | None) -> bool:
    """Return whether TensorRT-LLM has to see what a request shows.

    Of ``generation_only`` the prompt was computed elsewhere, and nothing is shown any more.
    """
    return bool(request.media) and request_type != _GENERATION_ONLY


def require_seen(request: GenerateRequest, inputs: Any, request_type: str | None) -> None:
    """Raise EngineError unless TensorRT-LLM will see what a request shows.

    Given token ids it drops embeddings in silence; given images beside embeddings it drops them too.
    """
    if not needs_media(request, request_type):
        return
    given = inputs if isinstance(inputs, dict) else {}
    shown = given.get("multi_modal_data") or given.get("multi_modal_embeddings") or {}
    if (
        not given.get("prompt")
        or "prompt_token_ids" in given
        or len(shown.get("image", ())) != len(request.media)
    ):
        raise EngineError(
            f"request {request.request_id}: TensorRT-LLM would not see all of its images; nothing was "
            "computed"
        )


def _whole(store: MediaStore, entry: Kept) -> memoryview | bytearray:
    runs = store.bytes_of(entry)
    if len(runs) == 1:
        return runs[0]
    return bytearray().join(runs)
