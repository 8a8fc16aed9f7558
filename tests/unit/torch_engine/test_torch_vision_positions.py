"""Where tokens stand around images, against transformers' own index."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.torch_engine.images import place, reference
from trtllm_workers.engines.torch.vision.mrope import Positions
from trtllm_workers.types import MediaItem


def items_of(generator: random.Random, count: int) -> list[MediaItem]:
    grids = [(1, generator.randint(1, 6), generator.randint(1, 6)) for _ in range(count)]
    return [MediaItem(bytes(16), 0, h * w, grid=(t, h, w)) for t, h, w in grids]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("seed", range(8))
def test_positions_are_those_of_transformers(
    family: str, seed: int, vision_model: Callable[[str], Path]
) -> None:
    model = reference(vision_model(family)).model
    token = model.config.image_token_id
    generator = random.Random(seed)
    parts: list[list[int] | MediaItem] = []
    for item in items_of(generator, generator.randint(1, 4)):
        parts += [[5] * generator.randint(1, 9), item]
    prompt, media = place([*parts, [5] * generator.randint(0, 3)], token)
    ids = torch.tensor([prompt])
    # Theirs is before merging 2 × 2 patches.
    grids = [(t, 2 * h, 2 * w) for t, h, w in (item.grid or (1, 1, 1) for item in media)]
    expected, delta = model.get_rope_index(
        input_ids=ids, mm_token_type_ids=(ids == token).int(), image_grid_thw=torch.tensor(grids)
    )
    ours = Positions(len(prompt), media)
    assert ours.delta == int(delta)
    rows = [[at] * 3 for at in ours.along_time(0, len(prompt))]
    for begin, axes in ours.in_images(0, len(prompt)):
        for at, row in enumerate(zip(*axes, strict=True), start=begin):
            rows[at] = list(row)
    assert rows == expected[:, 0].T.tolist()


@pytest.mark.parametrize("cut", [(0, 30), (3, 9), (6, 7), (11, 40), (25, 60), (41, 42), (50, 60)])
def test_any_part_of_a_prompt_and_its_answer_stands_where_it_does_in_the_whole(
    cut: tuple[int, int],
) -> None:
    generator = random.Random(1)
    prompt, media = place([[5] * 5, *items_of(generator, 2), [5] * 4], 9)
    positions = Positions(len(prompt), media)
    first, end = cut
    assert positions.along_time(first, end) == positions.along_time(0, 80)[first:end]
    whole = {
        begin + at: row
        for begin, axes in positions.in_images(0, 80)
        for at, row in enumerate(zip(*axes, strict=True))
    }
    part = {
        begin + at: row
        for begin, axes in positions.in_images(first, end)
        for at, row in enumerate(zip(*axes, strict=True))
    }
    assert part == {at: row for at, row in whole.items() if first <= at < end}


def test_what_follows_the_prompt_goes_on_by_one() -> None:
    prompt, media = place([[5] * 5, *items_of(random.Random(1), 2), [5] * 4], 9)
    positions = Positions(len(prompt), media)
    along = positions.along_time(len(prompt) - 2, len(prompt) + 5)
    assert along == list(range(along[0], along[0] + 7))
    assert positions.delta < 0
