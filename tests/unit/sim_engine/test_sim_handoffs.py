"""What only the simulator promises of handoffs: bytes that tell, pages, time. The suite has the rest."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract.handoffs import ask_prefill, ask_reserve, copy_kv, pool_of, resume
from tests.contract.harness import ask, prompt_of, request_of, tokens_of
from tests.fakes.virtual_clock import VirtualClockLoop, run_virtual
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.sim.engine import SimEngine
from trtllm_workers.engines.sim.kv_memory import (
    find_wrong,
    map_pool,
    prompt_digests,
    write_digests,
)
from trtllm_workers.engines.sim.settings import KEYS
from trtllm_workers.errors import ConfigError, EngineError, LayoutMismatch
from trtllm_workers.transfer.base import check_layouts
from trtllm_workers.types import KvLayout, TokenChunk

BLOCK_SIZE = 16
OUTPUT = 20
LAYOUT = KvLayout(
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    block_size=4,
    dtype="uint8",
    order="digest",
    block_bytes=48,
)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return model(tmp_path / "model")


def model(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"vocab_size": 1024, "max_position_embeddings": 4096, "eos_token_id": 4, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def engine_of(model_path: Path, cost: dict[str, Any] | None = None, **settings: Any) -> SimEngine:
    path = model_path.parent / "cost.yaml"
    path.write_text(json.dumps(cost or {}))
    settings = {"kv_cache_config__tokens_per_block": BLOCK_SIZE, **settings}
    config = default_config("sim", KEYS, **settings)
    return SimEngine(EngineOptions(model_path, config, extra={"cost_path": str(path)}))


@asynccontextmanager
async def running(
    model_path: Path, cost: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[SimEngine]:
    engine = engine_of(model_path, cost, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


# --- bytes that tell ---------------------------------------------------------------------------


async def spoilt(model_path: Path, how: str, prompt: list[int]) -> tuple[list[int], SimEngine]:
    """Hand a prompt over with something wrong in its bytes; return the answer and who made it."""
    async with running(model_path) as prefill, running(model_path) as decode:
        request = request_of(prompt, OUTPUT)
        prefilled = await ask_prefill(prefill, request).result()
        reserved = await ask_reserve(decode, request).result()
        copy_kv(prefill, prefilled, decode, reserved)
        blocks = [pool_of(decode).block(block) for block in reserved.block_ids]
        if how == "a bit":
            blocks[1][-1] ^= 1
        elif how == "swapped":
            blocks[0][:], blocks[1][:] = bytes(blocks[1]), bytes(blocks[0])
        elif how == "cut short":
            blocks[2][len(blocks[2]) // 2 :] = bytes(len(blocks[2]) // 2)
        elif how == "the partly filled one":
            blocks[-1][:] = bytes(len(blocks[-1]))
        elif how == "nothing came":
            for block in blocks:
                block[:] = bytes(len(block))
        answer = await resume(decode, request, prefilled.first).end()
        assert answer.tokens[0] == prefilled.first.token_ids[0]
        assert len(answer.tokens) == OUTPUT
        again = await ask(decode, prompt, OUTPUT).end()
        assert again.tokens == await right(model_path, prompt)  # nothing wrong was cached
        assert (again.cached_tokens == 0) == (how != "right")
        return answer.tokens, decode


async def right(model_path: Path, prompt: list[int]) -> list[int]:
    async with running(model_path) as engine:
        return await tokens_of(engine, prompt, OUTPUT)


@pytest.mark.parametrize(
    "how", ["a bit", "swapped", "cut short", "the partly filled one", "nothing came"]
)
async def test_wrong_bytes_lead_the_answer_astray(model_path: Path, how: str) -> None:
    prompt = prompt_of(0, 60)
    tokens, decode = await spoilt(model_path, how, prompt)
    assert tokens[1:] != (await right(model_path, prompt))[1:]
    assert decode.num_wrong_blocks == {"swapped": 2, "nothing came": 4}.get(how, 1)


async def test_right_bytes_do_not(model_path: Path) -> None:
    prompt = prompt_of(0, 60)
    tokens, decode = await spoilt(model_path, "right", prompt)
    assert tokens == await right(model_path, prompt)
    assert decode.num_wrong_blocks == 0


async def test_bytes_of_another_model_or_salt_are_wrong(tmp_path: Path) -> None:
    prompt = prompt_of(0, 60)
    ours, theirs = model(tmp_path / "a" / "model"), model(tmp_path / "b" / "model", note="other")
    for path, salt in ((theirs, ""), (ours, "theirs")):
        async with running(path) as prefill, running(ours) as decode:
            source = request_of(prompt, OUTPUT, cache_salt=salt)
            target = request_of(prompt, OUTPUT)
            prefilled = await ask_prefill(prefill, source).result()
            reserved = await ask_reserve(decode, target).result()
            copy_kv(prefill, prefilled, decode, reserved)
            await resume(decode, target, prefilled.first).end()
            assert decode.num_wrong_blocks == 4


def test_every_byte_of_a_block_follows_from_its_tokens() -> None:
    pool = map_pool(LAYOUT, 4)
    tokens = [5, 6, 7, 8, 9, 10]
    digests = list(prompt_digests(tokens, LAYOUT.block_size, b"root"))
    assert len(set(digests)) == 2
    assert digests[0] == next(prompt_digests(tokens[:4], LAYOUT.block_size, b"root"))
    assert digests[1] != list(prompt_digests([*tokens, 11], LAYOUT.block_size, b"root"))[1]
    write_digests(pool, (3, 1), digests)
    assert not any(pool.block(0))
    assert not any(pool.block(2))
    assert find_wrong(pool, (3, 1), digests) == {}
    assert set(find_wrong(pool, (1, 3), digests)) == {1, 3}
    for index in range(LAYOUT.block_bytes):
        pool.block(3)[index] ^= 0x80
        assert list(find_wrong(pool, (3, 1), digests)) == [3]
        pool.block(3)[index] ^= 0x80


async def test_right_bytes_are_prefix_cache_from_resume_on(model_path: Path) -> None:
    prompt = prompt_of(0, 60)
    async with running(model_path) as prefill, running(model_path) as decode:
        request = request_of(prompt, OUTPUT)
        prefilled = await ask_prefill(prefill, request).result()
        reserved = await ask_reserve(decode, request).result()
        copy_kv(prefill, prefilled, decode, reserved)
        resume(decode, request, prefilled.first)
        decode.abort(request.request_id)
        assert (await ask(decode, prompt, 1).end()).cached_tokens == 48


async def test_prompt_tokens_count_where_the_prompt_is_computed(model_path: Path) -> None:
    async with running(model_path) as prefill, running(model_path) as decode:
        for brought in (True, False):
            request = request_of(prompt_of(brought, 60), OUTPUT)
            prefilled = await ask_prefill(prefill, request).result()
            reserved = await ask_reserve(decode, request).result()
            copy_kv(prefill, prefilled, decode, reserved)
            await resume(decode, request, prefilled.first if brought else None).end()
        assert (prefill.stats().prompt_tokens, prefill.stats().output_tokens) == (120, 2)
        assert (decode.stats().prompt_tokens, decode.stats().output_tokens) == (60, 2 * OUTPUT - 1)


def test_large_blocks_show_shifted_and_missing_pages() -> None:
    layout = msgspec.structs.replace(LAYOUT, block_bytes=1 << 20)
    pool = map_pool(layout, 2)
    digest = next(prompt_digests([5, 6], layout.block_size, b"root"))
    write_digests(pool, (0,), [digest])
    assert find_wrong(pool, (0,), [digest]) == {}
    for shift in (1, 64, 4096, 65536, 1 << 19):
        pool.block(1)[shift:] = pool.block(0)[:-shift]
        pool.block(1)[:shift] = pool.block(0)[-shift:]
        assert list(find_wrong(pool, (1,), [digest])) == [1]
    pool.block(1)[:] = pool.block(0)
    assert find_wrong(pool, (1,), [digest]) == {}
    pool.block(1)[-4096:] = bytes(4096)
    assert list(find_wrong(pool, (1,), [digest])) == [1]


# --- layout and pages --------------------------------------------------------------------------


async def test_the_layout_tells_models_and_block_sizes_apart(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64}
    small = model(tmp_path / "small" / "model", **shape, num_key_value_heads=2)
    async with running(small, {"kv_block_bytes": 4096}) as engine:
        found = pool_of(engine).layout
        assert (found.num_layers, found.num_kv_heads, found.head_dim) == (3, 2, 8)
        assert (found.block_bytes, found.block_size, found.dtype) == (4096, 16, "uint8")
        assert len(pool_of(engine).memory) == 4096 * pool_of(engine).num_blocks
    bare = model(tmp_path / "bare" / "model")
    async with running(bare) as engine, running(bare, kv_cache_config__tokens_per_block=8) as other:
        ours, theirs = pool_of(engine).layout, pool_of(other).layout
        assert (ours.num_layers, ours.num_kv_heads, ours.head_dim, ours.block_bytes) == (
            1,
            1,
            1,
            64,
        )
        check_layouts(ours, ours, "peer")
        with pytest.raises(LayoutMismatch, match="block_size is 16 here and 8 there"):
            check_layouts(ours, theirs, "peer")
        with pytest.raises(LayoutMismatch, match="num_layers is 1 here and 3 there"):
            check_layouts(ours, found, "peer")


async def test_a_pool_that_cannot_be_mapped_names_the_keys(model_path: Path) -> None:
    engine = engine_of(model_path, {"kv_block_bytes": 1 << 28}, kv_cache_config__max_tokens=1 << 40)
    with pytest.raises(ConfigError, match=r"max_tokens, or kv_block_bytes") as caught:
        await engine.start()
    assert caught.value.param == "kv_cache_config.max_tokens"
    await engine.close()
    assert engine.kv_pool is None


async def test_close_lets_go_of_the_pages(model_path: Path) -> None:
    engine = engine_of(model_path)
    assert engine.kv_pool is None
    await engine.start()
    pages = weakref.ref(pool_of(engine).memory.obj)
    pinned = ask_prefill(engine, request_of(prompt_of(0, 40)))
    held = pool_of(engine).block((await pinned.result()).block_ids[0])
    await engine.close()
    gc.collect()
    assert any(held)  # who still looks at them may
    del held
    gc.collect()
    assert pages() is None
    assert engine.kv_pool is None


# --- time --------------------------------------------------------------------------------------


def test_a_prefill_tells_its_waiting_and_its_computing_apart(model_path: Path) -> None:
    async def main() -> None:
        assert isinstance(asyncio.get_running_loop(), VirtualClockLoop)
        cost = {"prefill": {"base_ms": 10}, "decode": {"base_ms": 10}}
        async with running(model_path, cost, max_num_tokens=32, max_batch_size=1) as engine:
            first, second = (ask_prefill(engine, request_of(prompt_of(i, 64))) for i in range(2))
            done = await first.result()
            assert [done.queue_s, done.compute_s] == pytest.approx([0, 0.02])
            # The pinned one makes room in the batch when its last step ends.
            done = await second.result()
            assert [done.queue_s, done.compute_s] == pytest.approx([0.02, 0.02])

    run_virtual(main())


def test_a_resumed_stream_gets_its_first_token_at_once_and_the_next_with_a_step(
    model_path: Path,
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with (
            running(model_path) as prefill,
            running(model_path, {"decode": {"base_ms": 10}}) as decode,
        ):
            mate = ask(decode, prompt_of(9, 20), 100)
            await mate.reaches(3)
            request = request_of(prompt_of(0, 40), 5)
            prefilled = await ask_prefill(prefill, request).result()
            reserved = await ask_reserve(decode, request).result()
            copy_kv(prefill, prefilled, decode, reserved)
            await asyncio.sleep(0.004)  # into a step of the mate's
            begin = loop.time()
            answer = resume(decode, request, prefilled.first)
            await answer.reaches(1)
            assert loop.time() == begin
            await answer.reaches(2)
            assert loop.time() - begin == pytest.approx(0.016)
            await answer.end()
            assert loop.time() - begin == pytest.approx(0.046)

    run_virtual(main())


def test_an_engine_that_only_holds_blocks_stands_still(model_path: Path) -> None:
    async def main() -> None:
        settings: dict[str, Any] = {"kv_cache_config__max_tokens": 6 * BLOCK_SIZE}
        async with running(model_path, **settings) as engine:
            pinned = ask_prefill(engine, request_of(prompt_of(0, 40)))
            reserved = ask_reserve(engine, request_of(prompt_of(1, 40)))
            await pinned.result()
            await reserved.result()
            waiting = ask(engine, prompt_of(2, 40), 2)
            # The virtual clock moves on only when nothing is ready to run.
            await asyncio.sleep(1)
            assert not waiting.chunks
            steps = engine.stats().num_steps
            await asyncio.sleep(3600)
            assert engine.stats().num_steps == steps
            engine.release(pinned.request_id)
            assert len((await waiting.end()).tokens) == 2

    run_virtual(main())


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "first"), [(8, TokenChunk(())), (8, TokenChunk((7, 8))), (1, TokenChunk((7,)))]
)
async def test_a_first_chunk_that_does_not_fit_is_refused_and_the_reservation_stays(
    model_path: Path, max_tokens: int, first: TokenChunk
) -> None:
    async with running(model_path) as engine:
        request = request_of(prompt_of(0, 20), max_tokens)
        await ask_reserve(engine, request).result()
        with pytest.raises(EngineError, match="its first chunk holds"):
            resume(engine, request, first)
        answer = await resume(engine, request, None).end()
        assert len(answer.tokens) == max_tokens


async def test_a_first_token_comes_first_even_when_timers_overtake_callbacks(
    model_path: Path,
) -> None:
    """As on a loop that is late: what is due runs before what was to be called soon."""
    async with running(model_path) as prefill, running(model_path) as decode:
        prompt = prompt_of(1, 40)
        expected = await tokens_of(prefill, prompt, OUTPUT)
        request = request_of(prompt, OUTPUT)
        prefilled = await ask_prefill(prefill, request).result()
        reserved = await ask_reserve(decode, request).result()
        copy_kv(prefill, prefilled, decode, reserved)
        answer = resume(decode, request, prefilled.first)
        assert decode._started is not None
        for _ in range(3):
            decode._turn(decode._started)
        assert answer.tokens == expected[: len(answer.tokens)]
        assert len(answer.tokens) >= 2
        assert (await answer.end()).tokens == expected
