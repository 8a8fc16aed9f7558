"""What a context phase leaves for a generation phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_TYPES = ("context_only", "generation_only", "context_and_generation")


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    """All fields that 1.2.1 has, and no others."""

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None
    multimodal_hashes: list[list[int]] | None = None
    mrope_position_ids_handle: dict[str, Any] | None = None
    mrope_position_deltas_handle: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.request_type is not None:
            self.request_type = self.request_type.lower()
            if self.request_type not in _TYPES:
                raise ValueError(f"Unknown request type: {self.request_type}")
        if self.request_type == "generation_only" and self.multimodal_embedding_handles:
            raise ValueError("generation_only takes no multimodal_embedding_handles")
