"""What every engine checks of a request's images."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trtllm_workers.engines.acceptance import check_media, check_request, pin_media, unpin_media
from trtllm_workers.errors import EngineError, NotSupported, RequestError
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import (
    EngineInfo,
    GenerateRequest,
    MediaItem,
    SamplingParams,
    VisionInfo,
)

PAD = 9
VISION = VisionInfo(
    family="llava", image_token_id=PAD, placeholder="<image>", hidden_size=4, dtype="float32"
)
INFO = EngineInfo(
    engine="sim",
    model_path="/m",
    model_id="m",
    block_size=4,
    num_blocks=100,
    max_seq_len=100,
    max_batch_size=4,
    max_num_tokens=100,
    vocab_size=50,
    capabilities=("max_tokens",),
    vision=VISION,
)
TEXT_ONLY = msgspec.structs.replace(INFO, vision=None)
GRIDS = msgspec.structs.replace(INFO, vision=msgspec.structs.replace(VISION, uses_grid=True))


def item(offset: int, num_tokens: int, name: bytes = b"a", **more: Any) -> MediaItem:
    return MediaItem(name * 16, offset, num_tokens, num_bytes=num_tokens * 16, **more)


def asked(prompt: list[int], *media: MediaItem) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=2),
        media=media,
    )


GOOD = asked([1, PAD, PAD, PAD, 2, PAD, 3], item(1, 3), item(5, 1, b"b"))


def test_images_on_their_placeholders_are_taken() -> None:
    check_request(GOOD, INFO, chunked_prefill=True, running=())
    # Two images side by side are told apart by their lengths alone.
    check_media(asked([PAD] * 4, item(0, 1), item(1, 3, b"b")), INFO)


def test_text_alone_is_taken_everywhere() -> None:
    for info in (INFO, TEXT_ONLY, GRIDS):
        check_media(asked([1, 2, 3]), info)
    check_media(asked([1, PAD, 3]), TEXT_ONLY)  # a token like any other there


def test_a_text_only_engine_refuses_images_by_name() -> None:
    with pytest.raises(NotSupported, match="takes text only; send no images") as caught:
        check_request(GOOD, TEXT_ONLY, chunked_prefill=True, running=())
    assert caught.value.param == "media"
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("prompt", "media", "message", "param"),
    [
        ([1, PAD], (), "stand for no image", "prompt_token_ids"),
        ([1, PAD, PAD], (item(1, 1),), "stand for no image", "prompt_token_ids"),
        ([PAD, 1, PAD], (item(0, 1), item(0, 1)), "not after the image before", "media"),
        ([PAD, PAD, PAD], (item(0, 2), item(1, 2)), "not after the image before", "media"),
        ([PAD, PAD], (item(1, 1), item(0, 1)), "not after the image before", "media"),
        ([1, PAD], (item(1, 2),), "inside the prompt's 2", "media"),
        ([1, PAD], (item(-1, 1),), "not after", "media"),
        ([1, PAD], (item(1, 0),), "takes 0 tokens", "media"),
        ([1, PAD], (item(5, -4),), "takes -4 tokens", "media"),
        ([1, PAD, 2], (item(1, 2),), "other tokens than placeholders", "media"),
        ([1, 2, 3], (item(1, 1),), "other tokens than placeholders", "media"),
        ([1, PAD], (item(1, 1, grid=(1, 1, 1)),), "a grid, which no model of family", "media"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    prompt: list[int], media: tuple[MediaItem, ...], message: str, param: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_media(asked(prompt, *media), INFO)
    assert caught.value.param == param


def test_a_model_in_space_needs_grids() -> None:
    with pytest.raises(RequestError, match="has no grid, which model of family llava uses"):
        check_media(GOOD, GRIDS)


def test_pins_are_taken_all_or_none() -> None:
    store = MediaStore(num_blocks=4, rows_per_block=4, row_size=4, dtype="f", value_bytes=4)
    with pytest.raises(EngineError, match="the bytes of image 0 are not here"):
        pin_media(GOOD, None)
    first = item(1, 3)
    store.unpin(store.commit(store.claim(first.num_bytes), first))
    with pytest.raises(EngineError, match="the bytes of image 1 are not here"):
        pin_media(GOOD, store)
    assert store.num_pinned == 0
    second = item(5, 1, b"b")
    store.unpin(store.commit(store.claim(second.num_bytes), second))
    pinned = pin_media(GOOD, store)
    assert [entry.item.digest for entry in pinned] == [b"a" * 16, b"b" * 16]
    assert store.num_pinned == 2
    unpin_media(store, pinned)
    assert store.num_pinned == 0
    assert pin_media(asked([1]), None) == []
