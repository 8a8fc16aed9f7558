from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.media.support import (
    HIDDEN,
    PARAM,
    Rooms,
    answering,
    load,
    load_rows,
    loader,
    response,
    serving,
    written,
)
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.loader import MediaLoader

LIMIT = 4 << 20


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[MediaLoader]:
    settings = MediaSettings(
        allowed_local_path=tmp_path, allow_pickle=True, max_file_bytes=LIMIT, timeout_s=20.0
    )
    async with loader(settings) as one:
        yield one


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


async def refused(made: MediaLoader, tmp_path: Path, content: bytes, name: str = "x.pt") -> str:
    rooms = Rooms()
    with pytest.raises(MediaRejected) as caught:
        await load(made, written(tmp_path / name, content), rooms)
    assert rooms.open == []
    assert caught.value.param == PARAM
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.PT"])
async def test_without_leave_no_pickled_file_is_even_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    async with loader(MediaSettings(allowed_local_path=tmp_path)) as made:
        for where in (
            tmp_path / name,
            tmp_path / "nothing" / name,
            f"http://127.0.0.1:1/{name}?x=1",
        ):
            with pytest.raises(MediaRejected, match="operator allows pickled"):
                await load(made, str(where), Rooms())
        assert made.pids == []


async def test_tensors_and_dicts(made: MediaLoader, tmp_path: Path) -> None:
    rows = torch.randn(2, 3, HIDDEN)
    grid = torch.tensor([[1, 2, 6], [1, 6, 2]])
    for value in (
        rows,
        {"mm_embeddings": rows, "image_grid_thw": grid},
        OrderedDict(anything=rows),
        torch.nn.Parameter(rows),
        rows.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        content = saved(value)
        found = await load_rows(made, written(tmp_path / "x.pt", content))
        assert b"".join(image.room.content for image in found.images) == rows.numpy().tobytes()
        expected = [(1, 2, 6), (1, 6, 2)] if type(value) is dict else [None, None]
        assert [image.grid for image in found.images] == expected
    assert len(made.pids) == 1
    old = saved(rows[0].half(), _use_new_zipfile_serialization=False)
    [image] = (await load_rows(made, written(tmp_path / "x.bin", old))).images
    assert image.room.content == rows[0].half().float().numpy().tobytes()


async def test_pickled_embeddings_by_url(tmp_path: Path) -> None:
    rows = torch.randn(3, HIDDEN)
    settings = MediaSettings(allow_pickle=True, url_hosts=("127.0.0.1",), timeout_s=20.0)
    async with serving(answering(response(saved(rows)))) as server, loader(settings) as made:
        [image] = (await load_rows(made, server.url("/x.pth?sig=1"))).images
        assert image.room.content == rows.numpy().tobytes()


class Payload:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


async def test_code_in_a_pickle_is_not_run(made: MediaLoader, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for content in (
        saved(Payload(mark)),
        saved({"mm_embeddings": torch.zeros(2, HIDDEN), "x": Payload(mark)}),
        saved(Payload(mark), _use_new_zipfile_serialization=False),
        pickle.dumps(Payload(mark)),
        b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
    ):
        await refused(made, tmp_path, content)
    assert not mark.exists()
    assert torch.load(io.BytesIO(saved(Payload(mark))), weights_only=False) == 0
    assert mark.exists()  # it would have been


class Calculated:
    def __reduce__(self) -> Any:
        return eval, (f"__import__('torch').ones(2, {HIDDEN})",)


async def test_nor_is_code_that_makes_good_tensors(made: MediaLoader, tmp_path: Path) -> None:
    # The child is also kept from starting programs; this would need none.
    for value in (Calculated(), {"mm_embeddings": Calculated()}):
        assert "other things than tensors" in await refused(made, tmp_path, saved(value))


def stretched(content: bytes) -> bytes:
    """Return a .pt file whose parts are compressed."""
    source, target = io.BytesIO(content), io.BytesIO()
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target.getvalue()


async def test_bombs_do_not_unpack(made: MediaLoader, tmp_path: Path) -> None:
    bomb = stretched(saved(torch.zeros(10 << 20, HIDDEN)))  # 320 MiB of zeros
    assert len(bomb) < LIMIT
    assert "unpacks to more" in await refused(made, tmp_path, bomb)
    # The rows of this one are all the same memory.
    assert "unpacks to more" in await refused(
        made, tmp_path, saved(torch.zeros(1).expand(1 << 40, HIDDEN))
    )
    just = LIMIT // HIDDEN // 4
    assert "unpacks to more" in await refused(
        made, tmp_path, stretched(saved(torch.zeros(just + 1, HIDDEN)))
    )
    path = written(tmp_path / "y.pt", stretched(saved(torch.zeros(just, HIDDEN))))
    assert (await load_rows(made, path)).images[0].num_tokens == just


async def test_what_is_no_tensor_is_refused(made: MediaLoader, tmp_path: Path) -> None:
    rows = torch.zeros(2, HIDDEN)
    for value in (
        *(None, 1, "x", [], [rows], (rows,), {}, {1: rows}, {"x": 1}, {"x": {"y": rows}}),
        rows.to_sparse(),
        rows.to(torch.complex64),
        torch.zeros(2, HIDDEN, device="meta"),
        {"mm_embeddings": rows, "special_tokens": [1, 2]},
        {str(index): rows for index in range(65)},
        {"x" * 300: rows},
    ):
        await refused(made, tmp_path, saved(value))
    for content in (b"", b"x", b"PK\x03\x04", b"\x80", saved(rows)[:200], os.urandom(500)):
        await refused(made, tmp_path, content)


async def test_tensors_are_checked_like_those_of_any_file(
    made: MediaLoader, tmp_path: Path
) -> None:
    bad = torch.zeros(2, HIDDEN)
    bad[1, 1] = float("nan")
    assert "finite" in await refused(made, tmp_path, saved(bad))
    assert "wide" in await refused(made, tmp_path, saved(torch.zeros(2, HIDDEN + 1)))
    assert "I64" in await refused(made, tmp_path, saved(torch.zeros(2, HIDDEN, dtype=torch.int64)))
    assert "offsets" in await refused(
        made, tmp_path, saved({"mm_embeddings": torch.zeros(2, HIDDEN), "offsets": torch.zeros(2)})
    )
    assert "no embeddings" in await refused(made, tmp_path, saved(torch.zeros(0, HIDDEN)))
