"""A prompt as the router sees it: tokens, and the hashes of its blocks once somebody asks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from trtllm_workers.blocks import TOKEN_TYPE, media_marks, namespace, root_hash
from trtllm_workers.router.index import Chain
from trtllm_workers.types import MediaItem


class Query:
    """One prompt to be placed, perhaps in two pools. ``salt`` and ``lora`` keep prefix caches apart.

    ``media`` are its images: prompts that differ in what they show share nothing from there on.
    """

    __slots__ = ("_chains", "_packed", "cache_salt", "lora", "media", "prompt_token_ids")

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        *,
        cache_salt: str = "",
        lora: str = "",
        media: Sequence[MediaItem] = (),
    ) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.cache_salt = cache_salt
        self.lora = lora
        self.media = media
        self._packed = b""
        self._chains: dict[tuple[str, int], Chain] = {}

    def chain(self, model_id: str, block_size: int) -> Chain:
        """Return the hashes of the full blocks, as an engine of that model makes them."""
        key = (model_id, block_size)
        chain = self._chains.get(key)
        if chain is None:
            if not self._packed:
                self._packed = array(TOKEN_TYPE, self.prompt_token_ids).tobytes()
            size = block_size * array(TOKEN_TYPE).itemsize
            root = root_hash(model_id, self.salt)
            marks = media_marks(self.media, block_size) if self.media else None
            chain = self._chains[key] = Chain(self._packed, size, root, marks)
        return chain

    @property
    def salt(self) -> str:
        """What an engine mixes into the first block's parent: an adapter's KV is another model's."""
        return namespace(self.cache_salt, self.lora)
