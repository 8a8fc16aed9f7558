"""Files of embeddings: what ``embed`` writes is what an encoder made, and others can read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors import safe_open

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.base import Engine, ImagePlan
from trtllm_workers.errors import ConfigError, MediaRejected
from trtllm_workers.types import NO_ENGINE, EngineInfo, MediaReference, VisionInfo
from trtllm_workers.worker.embed import Embeddings, embed_images, one_by_one, write_embeddings

HIDDEN = 4
VISION = VisionInfo(
    family="qwen2_vl", image_token_id=7, placeholder="<i>", hidden_size=HIDDEN, dtype="float32",
    uses_grid=True,
)  # fmt: skip


class FakeEncoder:
    """A row for each 2 × 2 pixels (merged patches of 1 pixel); it counts them."""

    fingerprint = b"\x01\x02"

    def __init__(self, merge: int = 2, *, uses_grid: bool = True) -> None:
        self.merge = merge
        self.uses_grid = uses_grid

    def plan(self, height: int, width: int) -> ImagePlan:
        if height < 2:
            raise MediaRejected("too flat")
        tokens = (height // 2) * (width // 2)
        grid = (1, height // 2, width // 2) if self.uses_grid else None
        return ImagePlan(tokens, tokens * HIDDEN * 4, grid)

    def check_grid(
        self, num_tokens: int, grid: tuple[int, int, int] | None
    ) -> tuple[int, int, int] | None:
        return (grid[0], grid[1] // self.merge, grid[2] // self.merge) if grid else None

    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None:
        rows = np.arange(len(into[0]) // 4, dtype=np.float32) + pixels[0]
        into[0][:] = rows.tobytes()


class FakeEngine:
    def __init__(self, encoder: FakeEncoder | None, vision: VisionInfo | None = VISION) -> None:
        self.encoder = encoder
        self.vision = vision
        self.closed = 0

    async def start(self) -> EngineInfo:
        values = {name: getattr(NO_ENGINE, name) for name in NO_ENGINE.__struct_fields__}
        return EngineInfo(**values | {"engine": "fake", "vision": self.vision})

    async def close(self) -> None:
        self.closed += 1


def _text(path: Path) -> str:
    return path.read_text()


class FakeLoader:
    """Takes a file's text ("height width value") for an image."""

    opened = 0

    def __init__(self, settings: MediaSettings, vision: VisionInfo) -> None:
        FakeLoader.opened += 1
        self.settings = settings

    async def load(
        self, reference: MediaReference, claim: Callable[[int], Any], drop: Callable[[Any], None]
    ) -> Any:
        assert self.settings.allowed_local_path is not None
        path = Path(reference.url.removeprefix("file://").replace("%20", " "))
        assert path.parent == self.settings.allowed_local_path
        text = _text(path)
        if text == "embeddings":
            claim(8)
        height, width, value = map(int, text.split())

        class Image:
            pass

        image = Image()
        image.height, image.width, image.value = height, width, value  # type: ignore[attr-defined]
        return image

    async def pixels(self, image: Any) -> memoryview:
        return memoryview(bytes([image.value]) * (image.height * image.width * 3))

    async def close(self) -> None:
        FakeLoader.opened -= 1


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "vl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vision_config": {"spatial_merge_size": 2}}))
    return folder


def image(tmp_path: Path, name: str, height: int = 4, width: int = 6, value: int = 1) -> Path:
    path = tmp_path / name
    path.write_text(f"{height} {width} {value}")
    return path


async def embed(
    model: Path, *images: Path, encoder: FakeEncoder | None = None, **vision: Any
) -> Embeddings:
    engine = FakeEngine(encoder or FakeEncoder(), **vision)
    try:
        return await embed_images(
            cast("Engine", engine), FakeLoader, images,
            settings=MediaSettings(), model_path=model, model="vl",
        )  # fmt: skip
    finally:
        assert engine.closed == 1
        assert FakeLoader.opened == 0


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(str(path), "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


async def test_one_image_is_tokens_by_hidden_with_its_grid_in_patches(
    model: Path, tmp_path: Path
) -> None:
    made = await embed(model, image(tmp_path, "my cat.png"))
    out = tmp_path / "cat.safetensors"
    assert write_embeddings(out, made, dtype="float32") == (6, HIDDEN)
    tensors, metadata = read(out)
    assert tensors["mm_embeddings"].tolist() == (np.arange(24).reshape(6, 4) + 1).tolist()
    assert tensors["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert tensors["image_grid_thw"].dtype == np.int64
    assert metadata["trtllm_launch.made_by"] == "0102"
    assert metadata["trtllm_launch.model"] == "vl"
    assert metadata["trtllm_launch.created_by"].startswith("trtllm-launch ")


async def test_images_of_one_size_go_into_one_tensor_in_their_order(
    model: Path, tmp_path: Path
) -> None:
    pictures = [image(tmp_path, f"{value}.png", value=value) for value in (9, 3)]
    made = await embed(model, *pictures)
    out = tmp_path / "both.safetensors"
    assert write_embeddings(out, made, dtype="float32") == (2, 6, HIDDEN)
    tensors, _ = read(out)
    assert tensors["mm_embeddings"][:, 0, 0].tolist() == [9, 3]
    assert tensors["image_grid_thw"].tolist() == [[1, 4, 6]] * 2


async def test_images_of_different_sizes_are_refused_and_fit_one_by_one(
    model: Path, tmp_path: Path
) -> None:
    pictures = [image(tmp_path, "a.png"), image(tmp_path, "b.png", height=8)]
    made = await embed(model, *pictures)
    out = tmp_path / "both.safetensors"
    with pytest.raises(ConfigError, match=r"a\.png 6, b\.png 12.*existing folder"):
        write_embeddings(out, made, dtype="float32")
    assert not out.exists()
    assert [write_embeddings(out, one, dtype="float32") for one in one_by_one(made)] == [
        (6, HIDDEN),
        (12, HIDDEN),
    ]


async def test_a_model_without_grids_gets_none(model: Path, tmp_path: Path) -> None:
    made = await embed(model, image(tmp_path, "a.png"), encoder=FakeEncoder(uses_grid=False))
    write_embeddings(tmp_path / "a.safetensors", made, dtype="float32")
    assert list(read(tmp_path / "a.safetensors")[0]) == ["mm_embeddings"]


async def test_rows_are_converted_when_another_dtype_is_asked_for(
    model: Path, tmp_path: Path
) -> None:
    made = await embed(model, image(tmp_path, "a.png"))
    write_embeddings(tmp_path / "a.safetensors", made, dtype="float16")
    rows = read(tmp_path / "a.safetensors")[0]["mm_embeddings"]
    assert rows.dtype == np.float16
    assert rows[0].tolist() == [1, 2, 3, 4]
    before = (tmp_path / "a.safetensors").read_bytes()
    write_embeddings(tmp_path / "a.safetensors", made, dtype="bfloat16")
    assert (tmp_path / "a.safetensors").read_bytes() != before


async def test_a_grid_that_would_be_read_back_otherwise_is_an_error(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"spatial_merge_size in .*config\.json"):
        await embed(model, image(tmp_path, "a.png"), encoder=FakeEncoder(merge=4))


async def test_what_is_wrong_with_an_image_names_the_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"flat\.png: too flat"):
        await embed(model, image(tmp_path, "flat.png", height=1))
    disguised = tmp_path / "disguised.png"
    disguised.write_text("embeddings")
    with pytest.raises(ConfigError, match="embeddings already"):
        await embed(model, disguised)


async def test_an_engine_without_a_vision_tower_is_said_to_have_none(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="engine fake has no vision tower for vl"):
        await embed(model, image(tmp_path, "a.png"), vision=None)


async def test_a_symbolic_link_is_followed_by_the_operator_alone(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(image(tmp_path / "elsewhere", "a.png"))
    assert (await embed(model, link)).images[0].source == link


async def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    model: Path, tmp_path: Path
) -> None:
    made = await embed(model, image(tmp_path, "a.png"))
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "a.safetensors"
    out.write_text("old")
    broken = Embeddings(made.images, HIDDEN + 1, "float32", "", "")
    with pytest.raises(ValueError, match="mm_embeddings"):
        write_embeddings(out, broken, dtype="float32")
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    assert out.read_text() == "old"
