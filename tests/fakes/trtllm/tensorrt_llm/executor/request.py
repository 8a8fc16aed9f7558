"""What goes with a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LoRARequest:
    """Which adapter a request uses."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError("lora_int_id must be a positive number")
