from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tests.unit.media.support import (
    HIDDEN,
    PARAM,
    Room,
    Rooms,
    answering,
    load,
    load_rows,
    loader,
    response,
    safetensors,
    serving,
    vision,
    written,
)
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected, Overloaded
from trtllm_workers.media.embeddings import CHUNK_BYTES
from trtllm_workers.media.values import all_finite, convert
from trtllm_workers.types import MediaReference

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MODEL = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


async def refused(tmp_path: Path, content: bytes, **model: object) -> str:
    rooms = Rooms()
    async with loader(MediaSettings(allowed_local_path=tmp_path), vision(**model)) as made:
        with pytest.raises(MediaRejected) as caught:
            await load(made, written(tmp_path / "x.safetensors", content), rooms)
    assert rooms.open == []
    assert caught.value.param == PARAM
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


async def test_rows_of_one_image(tmp_path: Path) -> None:
    rows = torch.randn(5, HIDDEN)
    path = written(tmp_path / "x.safetensors", save({"any name": rows}))
    rooms = Rooms()
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        found = await load_rows(made, path, rooms)
    [image] = found.images
    assert (image.num_tokens, image.grid, found.made_by) == (5, None, "")
    assert image.room.content == raw(rows)
    assert rooms.open == [image.room]
    assert len(image.content) == 16


async def test_several_images_grids_and_who_made_them(tmp_path: Path) -> None:
    rows = torch.randn(3, 4, HIDDEN)
    grids = torch.tensor([[1, 2, 8], [1, 4, 4], [2, 2, 4]])
    save_file(
        {"mm_embeddings": rows, "image_grid_thw": grids},
        tmp_path / "x.safetensors",
        {"trtllm_launch.made_by": "beef"},
    )
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        found = await load_rows(made, "x.safetensors")
    assert found.made_by == "beef"
    assert [image.grid for image in found.images] == [(1, 2, 8), (1, 4, 4), (2, 2, 4)]
    assert [image.num_tokens for image in found.images] == [4, 4, 4]
    for image, own in zip(found.images, rows, strict=True):
        assert image.room.content == raw(own)


async def test_a_grid_of_32_bits_without_a_dimension(tmp_path: Path) -> None:
    tensors = {
        "mm_embeddings": torch.zeros(4, HIDDEN),
        "image_grid_thw": torch.tensor([1, 4, 4], dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        [image] = (await load_rows(made, "x.safetensors")).images
    assert image.grid == (1, 4, 4)


async def test_equal_rows_have_equal_content_and_others_do_not(tmp_path: Path) -> None:
    rows = torch.randn(6, HIDDEN)
    other = rows.clone()
    other[5, HIDDEN - 1] += 1
    grid = torch.tensor([[1, 2, 12]])
    files = {
        "same": save({"x": rows}),
        "named": save({"mm_embeddings": rows}),
        "wider": save({"x": rows.double()}),
        "other": save({"x": other}),
        "shape": save({"x": rows.reshape(2, 3, HIDDEN)}),
        "grid": save({"mm_embeddings": rows, "image_grid_thw": grid}),
        "grid2": save({"mm_embeddings": rows, "image_grid_thw": grid.flip(1)}),
    }
    contents = {}
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        for name, file in files.items():
            path = written(tmp_path / "x.safetensors", file)
            contents[name] = (await load_rows(made, path)).images[0].content
    assert contents["same"] == contents["named"] == contents["wider"]
    del contents["named"], contents["wider"]
    assert len(set(contents.values())) == len(contents)


@pytest.mark.parametrize("to", MODEL)
@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_dtype_becomes_the_models(tmp_path: Path, dtype: str, to: str) -> None:
    rows = torch.randn(40, HIDDEN, dtype=torch.float64).to(DTYPES[dtype])
    path = written(tmp_path / "x.safetensors", save({"x": rows}))
    async with loader(MediaSettings(allowed_local_path=tmp_path), vision(dtype=to)) as made:
        [image] = (await load_rows(made, path)).images
    assert image.room.content == raw(rows.to(MODEL[to]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("to", MODEL)
async def test_what_is_not_finite_is_refused(
    tmp_path: Path, dtype: str, bad: float, to: str
) -> None:
    rows = torch.randn(30, HIDDEN).to(DTYPES[dtype])
    rows[29, HIDDEN - 1] = bad
    assert "finite" in await refused(tmp_path, save({"x": rows}), dtype=to)


async def test_what_overflows_in_the_models_dtype_is_refused(tmp_path: Path) -> None:
    rows = torch.zeros(3, HIDDEN)
    rows[1, 1] = -1e5
    assert "too large" in await refused(tmp_path, save({"x": rows}), dtype="float16")
    assert "too large" in await refused(
        tmp_path, save({"x": rows.double() * 1e300}), dtype="float32"
    )
    rows[1, 1] = 3.4e38  # finite as float32, and rounds to infinity
    assert "too large" in await refused(tmp_path, save({"x": rows}), dtype="bfloat16")


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_finite_and_rounding_as_torch_has_them(values: list[float]) -> None:
    single = torch.tensor(values, dtype=torch.float32)
    for dtype, kind in DTYPES.items():
        own = single.to(kind)
        assert all_finite(memoryview(raw(own)), dtype) == bool(own.isfinite().all())
    if single.isfinite().all():
        for to in ("BF16", "F16"):
            assert convert(raw(single), "F32", to).tobytes() == raw(single.to(DTYPES[to]))


def test_every_16_bit_value_is_known_to_be_finite_or_not() -> None:
    for dtype in ("BF16", "F16"):
        values = torch.arange(1 << 16).to(torch.uint16).view(DTYPES[dtype])
        expected = values.isfinite().tolist()
        found = [all_finite(memoryview(raw(values[at : at + 1])), dtype) for at in range(1 << 16)]
        assert found == expected


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"x": torch.zeros(4, HIDDEN + 1)}, f"{HIDDEN + 1} wide, those of the model {HIDDEN}"),
        ({"x": torch.zeros(HIDDEN)}, "1 dimensions"),
        ({"x": torch.zeros(1, 1, 4, HIDDEN)}, "4 dimensions"),
        ({"x": torch.zeros(())}, "0 dimensions"),
        ({"x": torch.zeros(0, HIDDEN)}, "no embeddings"),
        ({"x": torch.zeros(0, 4, HIDDEN)}, "no embeddings"),
        ({"x": torch.zeros(2, 0, HIDDEN)}, "no embeddings"),
        ({"x": torch.zeros(17, 1, HIDDEN)}, "17 images"),
        ({"x": torch.zeros(4, HIDDEN, dtype=torch.int32)}, "I32"),
        ({"x": torch.zeros(4, HIDDEN, dtype=torch.float8_e4m3fn)}, "F8_E4M3"),
        (
            {"mm_embeddings": torch.zeros(4, HIDDEN), "special_tokens": torch.zeros(2)},
            "special_tokens",
        ),
    ],
)
async def test_shapes_dtypes_and_names_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], why: str
) -> None:
    assert why in await refused(tmp_path, save(tensors))


@pytest.mark.parametrize(
    "grid",
    [
        torch.tensor([[1, 2, 2], [1, 2, 2]]),
        torch.tensor([[1, 2]]),
        torch.tensor([1, 2, 2, 2]),
        torch.tensor(3),
        torch.tensor([[1.0, 2, 2]]),
        torch.tensor([[0, 2, 2]]),
        torch.tensor([[1, -2, -2]]),
        torch.tensor([[1, 1 << 40, 2]]),
    ],
)
async def test_grids_that_do_not_fit(tmp_path: Path, grid: torch.Tensor) -> None:
    tensors = {"mm_embeddings": torch.zeros(4, HIDDEN), "image_grid_thw": grid}
    assert "image_grid_thw" in await refused(tmp_path, save(tensors))


async def test_one_grid_of_three_numbers_is_not_for_two_images(tmp_path: Path) -> None:
    for grid in (torch.tensor([1, 2, 2]), torch.tensor(3)):
        tensors = {"mm_embeddings": torch.zeros(2, 4, HIDDEN), "image_grid_thw": grid}
        assert "image_grid_thw" in await refused(tmp_path, save(tensors))


async def test_a_file_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"x", b"\x80\x02}q\0.", os.urandom(200), b"PK\x03\x04" + bytes(100)):
        await refused(tmp_path, content)


async def test_a_shape_far_larger_than_the_file_claims_nothing(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [1 << 30, HIDDEN], "data_offsets": [0, 1 << 35]}}
    await refused(tmp_path, safetensors(header, bytes(64)))


async def test_large_files_over_many_chunks_and_runs(tmp_path: Path) -> None:
    rows = torch.randn(2, CHUNK_BYTES // 16, HIDDEN)
    path = written(tmp_path / "x.safetensors", save({"x": rows}))
    contents = []
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        for piece_bytes in (100 * HIDDEN, CHUNK_BYTES * 2 // 3 // 32 * 32, 1 << 30):
            found = await load_rows(made, path, Rooms(piece_bytes=piece_bytes))
            contents.append([image.content for image in found.images])
            for image, own in zip(found.images, rows, strict=True):
                assert image.room.content == raw(own)
    assert contents[0] == contents[1] == contents[2]
    assert contents[0][0] != contents[0][1]


async def test_a_file_that_is_cut_off_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "x.safetensors", save({"x": torch.zeros(CHUNK_BYTES, HIDDEN)}))
    real = os.preadv

    def cut(*arguments: object) -> int:
        os.truncate(path, 200)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", cut)
    rooms = Rooms(piece_bytes=1 << 20)
    async with loader(MediaSettings(allowed_local_path=tmp_path, max_file_bytes=1 << 30)) as made:
        with pytest.raises(MediaRejected, match="changed"):
            await load(made, path, rooms)
    assert rooms.open == []


async def test_two_loads_of_one_file_at_once(tmp_path: Path) -> None:
    rows = torch.randn(100, HIDDEN)
    path = written(tmp_path / "x.safetensors", save({"x": rows}))
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        found = await asyncio.gather(*(load_rows(made, path) for _ in range(20)))
    assert len({one.images[0].content for one in found}) == 1
    assert all(one.images[0].room.content == raw(rows) for one in found)


async def test_what_claim_raises_is_passed_on_and_earlier_rooms_go_back(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", save({"x": torch.zeros(3, 2, HIDDEN)}))
    rooms = Rooms()
    claims = 0

    def claim(num_bytes: int) -> Room:
        nonlocal claims
        claims += 1
        if claims == 3:
            raise Overloaded("full")
        return rooms.claim(num_bytes)

    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        with pytest.raises(Overloaded):
            await made.load(MediaReference(path, PARAM), claim, rooms.drop)
    assert claims == 3
    assert rooms.open == []


async def test_cancelling_leaves_no_room_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "x.safetensors", save({"x": torch.zeros(CHUNK_BYTES, HIDDEN)}))
    begun = threading.Event()
    real: Callable[..., int] = os.preadv

    def watched(*arguments: object) -> int:
        begun.set()
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", watched)
    rooms = Rooms(piece_bytes=1 << 20)
    async with loader(MediaSettings(allowed_local_path=tmp_path, max_file_bytes=1 << 30)) as made:
        task = asyncio.create_task(load(made, path, rooms))
        assert await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rooms.open == []


async def test_embeddings_by_url(tmp_path: Path) -> None:
    rows = torch.randn(7, HIDDEN)
    limits = MediaSettings(url_hosts=("127.0.0.1",))
    async with (
        serving(answering(response(save({"x": rows})))) as server,
        loader(limits) as made,
    ):
        [image] = (await load_rows(made, server.url("/x.safetensors?token=1"))).images
        assert image.room.content == raw(rows)
    async with serving(answering(response(b"no tensors"))) as server, loader(limits) as made:
        rooms = Rooms()
        with pytest.raises(MediaRejected, match="not taken"):
            await load(made, server.url("/x.safetensors"), rooms)
        assert rooms.open == []


async def test_an_answer_cut_off_leaves_nothing(tmp_path: Path) -> None:
    async with (
        serving(answering(response(b"abc", length=500))) as server,
        loader(MediaSettings(url_hosts=("127.0.0.1",))) as made,
    ):
        with pytest.raises(MediaRejected, match="could not be fetched"):
            await load(made, server.url("/x.safetensors"), Rooms())


async def test_a_model_that_takes_no_embeddings_or_no_images() -> None:
    async with loader(MediaSettings(), vision(embeddings=False)) as made:
        with pytest.raises(MediaRejected, match="only images"):
            await load(made, "/x.safetensors", Rooms())
    async with loader(MediaSettings(), vision(images=False)) as made:
        with pytest.raises(MediaRejected, match="only files of embeddings"):
            await load(made, "/x.png", Rooms())
