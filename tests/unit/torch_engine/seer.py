"""A core that takes images, and how to ask it and transformers the same. Holds no test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.torch_engine.driver import Driver
from tests.unit.torch_engine.images import Image, encode, generate, place
from trtllm_workers.engines.torch.vision.loading import Vision
from trtllm_workers.types import MediaItem

NUM_TOKENS = 24


@dataclass
class Seer:
    """A core that takes images, and the folder it was loaded from."""

    driver: Driver
    folder: Path

    @property
    def token(self) -> int:
        return self.vision.info.image_token_id

    @property
    def vision(self) -> Vision:
        vision = self.driver.core.loaded.vision
        assert vision is not None
        return vision

    def see(self, image: Image) -> MediaItem:
        encoder = self.vision.encoder
        assert encoder is not None
        return encode(encoder, self.vision.store, image)

    def place(self, *parts: Any) -> tuple[list[int], list[MediaItem]]:
        """Return a prompt of tokens, images and items."""
        seen = [self.see(part) if isinstance(part, np.ndarray) else part for part in parts]
        return place(seen, self.token)

    def ask(self, *parts: Any, max_tokens: int = NUM_TOKENS) -> list[int]:
        prompt, media = self.place(*parts)
        return self.driver.ask(prompt, max_tokens, media=media)

    def theirs(self, *parts: Any, max_tokens: int = NUM_TOKENS) -> list[int]:
        prompt, _media = self.place(*parts)
        images = [part for part in parts if isinstance(part, np.ndarray)]
        return generate(self.folder, prompt, images, max_tokens, self.token)
