"""The router's decisions for people and programs: routes, a response header, plain values. Decides nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from trtllm_workers.errors import LaunchError, RequestError, TooLarge
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.placing import Decision
from trtllm_workers.ingress.responses import error_body
from trtllm_workers.ingress.served import Worker
from trtllm_workers.router.pool import Choice

# A request that carries this header (with anything but 0, no, off or false) is answered with ROUTE_HEADER.
ASK_HEADER = b"x-trtllm-launch-explain"
ROUTE_HEADER = b"x-trtllm-launch-route"
_NOT_ASKED = (b"", b"0", b"no", b"off", b"false")
_MOST_DECISIONS = 1000

# Parses, tokenises and places a body without sending it anywhere.
Rehearse = Callable[[bytes], Awaitable[Decision]]


class _Unknown(RequestError):
    """Nothing is known of that request."""

    http_status = 404
    code = "unknown_request"


def wants_route(header: bytes | None) -> bool:
    """Return whether a request asks to be told where it went."""
    return header is not None and header.strip().lower() not in _NOT_ASKED


def route_header(decision: Decision) -> bytes:
    """Return one header value: who, with how much of the prompt cached, and why."""
    prefill = _one("prefill", decision.prefill)
    if decision.why_local:
        prefill = f"prefill=none chosen ({decision.why_local})"
    name = "worker" if decision.strategy == "aggregated" else "decode"
    parts = [f"strategy={decision.strategy}", prefill, _one(name, decision.maker)]
    line = "; ".join(part for part in parts if part)
    return line.encode("ascii", "replace").replace(b"\r", b" ").replace(b"\n", b" ")


def _one(name: str, choice: Choice | None) -> str:
    if choice is None:
        return ""
    return (
        f"{name}={choice.worker_id} (overlap {choice.overlap_tokens}/{choice.prompt_tokens} tokens, "
        f"cost {choice.cost:.4g}, {choice.reason})"
    )


def shown(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain values."""
    both = {"prefill": decision.prefill, "maker": decision.maker}
    found: dict[str, Any] = {
        "request_id": decision.request_id,
        "model": decision.model,
        "at_s": decision.at_s,
        "strategy": decision.strategy,
    }
    if decision.why_local:
        found["why_no_prefill_worker"] = decision.why_local
    return found | {name: _choice(one) for name, one in both.items() if one is not None}


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "worker_id": choice.worker_id,
        "mode": str(choice.mode),
        "overlap_tokens": choice.overlap_tokens,
        "prompt_tokens": choice.prompt_tokens,
        "cost": choice.cost,
        "reason": choice.reason,
        "candidates": [msgspec.to_builtins(row) for row in choice.rows],
    }


def add_routes(app: FastAPI, fleet: Fleet, rehearse: Rehearse, max_body_bytes: int) -> None:
    """Add the routes under ``/router``."""

    @app.get("/router")
    async def router() -> Response:
        found = fleet.placer.router
        return _json(
            {
                "mode": str(found.mode),
                "follows_events": found.follows_events,
                "workers": [
                    _worker(fleet, worker)
                    for served in fleet.models.values()
                    for worker in served.workers
                ],
            }
        )

    @app.get("/router/decisions")
    async def decisions(limit: int = 20) -> Response:
        last = fleet.placer.decisions.last(max(0, min(limit, _MOST_DECISIONS)))
        return _json({"decisions": [shown(one) for one in last]})

    @app.get("/router/decisions/{request_id}")
    async def decision(request_id: str) -> Response:
        # What a client knows are the ids of answers, which have a prefix.
        bare = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        found = fleet.placer.decisions.find(bare)
        if found is None:
            return _error(
                _Unknown(
                    f"no decision is kept for request '{request_id[:200]}'; the last "
                    f"{_MOST_DECISIONS} of this ingress are"
                )
            )
        return _json(shown(found))

    @app.post("/router/explain")
    async def explain(request: Request) -> Response:
        try:
            return _json(shown(await rehearse(await _body(request, max_body_bytes))))
        except LaunchError as error:
            return _error(error)


async def _body(request: Request, max_bytes: int) -> bytes:
    """Return the request's body. Raises TooLarge without holding more than ``max_bytes``."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise TooLarge(f"the request body is over {max_bytes} bytes")
    return bytes(body)


def _worker(fleet: Fleet, worker: Worker) -> dict[str, Any]:
    pool, address = fleet.placer.pool_of(worker), worker.record.address
    return {
        "worker_id": worker.worker_id,
        "role": str(worker.role),
        "state": worker.state,
        "problem": worker.problem,
        "indexed_blocks": pool.num_blocks(address),
        "resyncs": worker.num_resyncs,
        "decisions": dict(worker.decisions),
        "placed_tokens": worker.placed_tokens,
        "overlap_tokens": worker.overlap_tokens,
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(error: LaunchError) -> Response:
    return Response(error_body(error), error.http_status, media_type="application/json")
