"""How tests steer the stand-in, and what it has seen. No part of TensorRT-LLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DIE_SEED, WEDGE_SEED, FAIL_SEED = 666001, 666002, 666003


@dataclass
class Control:
    """``llm.fake``.

    ``seen`` holds the arguments of every ``generate_async``. ``torn`` counts requests that were aborted while
    their KV was on its way: the real thing may leak their blocks.
    """

    seen: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0
    fail_next: list[BaseException] = field(default_factory=list)
    death: BaseException | None = None
    wedged: bool = False
    drop_events: int = 0

    def fail_next_request(self, error: BaseException) -> None:
        """The next request fails with this."""
        self.fail_next.append(error)

    def die(self, error: BaseException) -> None:
        """Every open request raises this, and then nothing is taken any more."""
        self.death = error

    def wedge(self) -> None:
        """Requests are taken and nothing comes of them; the engine still calls itself healthy."""
        self.wedged = True
