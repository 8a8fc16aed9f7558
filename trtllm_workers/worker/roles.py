"""What each role does with a request. Reads as the design does; knows no socket and no HTTP."""

from __future__ import annotations

from collections.abc import Callable

from trtllm_workers.engines.base import Deliver, Engine
from trtllm_workers.types import GenerateRequest, Role

Handler = Callable[[Engine, GenerateRequest, Deliver], None]


def aggregated(engine: Engine, request: GenerateRequest, deliver: Deliver) -> None:
    """Prefill and decode here; tokens go straight to the ingress that asked."""
    engine.submit(request, deliver)


ROLES: dict[Role, Handler] = {Role.AGGREGATED: aggregated}
