"""The HTTP routes. What they answer is decided in ``dispatch.py`` and ``fleet.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtllm_workers.engines.base import ENGINE_NATIVE
from trtllm_workers.errors import LaunchError, ModelNotFound, RequestError
from trtllm_workers.ingress.dispatch import CHAT, COMPLETIONS, Dispatcher
from trtllm_workers.ingress.exchange import Exchange
from trtllm_workers.ingress.explain import add_routes
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.responses import error_body
from trtllm_workers.ingress.served import Served, Worker
from trtllm_workers.observe.metrics import CONTENT_TYPE, Metrics
from trtllm_workers.planes.messages import PairStats

OWNER = "trtllm-launch"
ENDPOINTS = (CHAT, COMPLETIONS)


class _NoRoute(RequestError):
    """There is nothing at this path."""

    http_status = 404
    code = "unknown_url"


class _WrongMethod(RequestError):
    """The path exists, for another method."""

    http_status = 405
    code = "method_not_allowed"


class IngressApp:
    """FastAPI's app behind a short cut: the two generating routes go round its middleware.

    They set their own request ids and shape their own errors, and the middleware would cost every
    request as much as all the rest of its way. Wrong methods on them are still FastAPI's.
    """

    def __init__(self, dispatcher: Dispatcher, routes: FastAPI) -> None:
        self._dispatcher = dispatcher
        self._routes = routes
        self._endpoints = {("POST", endpoint.path): endpoint for endpoint in ENDPOINTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            endpoint = self._endpoints.get((scope["method"], scope["path"]))
            if endpoint is not None:
                await self._dispatcher.serve(scope, receive, send, endpoint)
                return
        await self._routes(scope, receive, send)


class _RequestIds:
    """Gives every response of FastAPI's routes an x-request-id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Exchange(scope, receive, send).request_id.encode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


def make_app(dispatcher: Dispatcher, fleet: Fleet, metrics: Metrics) -> IngressApp:
    """Return the app. It owns nothing: what it shows is started and ended elsewhere."""
    # The interactive documentation would show none of the fields: the bodies are not pydantic's.
    app = FastAPI(title=OWNER, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_RequestIds)
    front = IngressApp(dispatcher, app)
    for endpoint in ENDPOINTS:
        # Never reached by POST; here so that the router knows the paths and their method.
        app.router.routes.append(Route(endpoint.path, endpoint=front, methods=["POST"]))

    @app.get("/v1/models")
    async def models() -> Response:
        known = sorted({**fleet.adapters, **fleet.models}.items())
        ready = [served for _, served in known if served.ready]
        return _json(200, {"object": "list", "data": [_model(served) for served in ready]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        served = fleet.find(model)
        if served is None or not served.ready:
            return _error(ModelNotFound(f"no model '{model[:200]}' is served here", param="model"))
        return _json(200, _model(served))

    @app.get("/live")
    async def live() -> Response:
        return _json(200, {"status": "live"})

    @app.get("/ready")
    async def ready() -> Response:
        status, missing = _readiness(fleet, dispatcher)
        return _json(status, {"status": _word(status), **missing})

    @app.get("/health")
    async def health() -> Response:
        status, missing = _readiness(fleet, dispatcher)
        shown = {
            "status": _word(status),
            **missing,
            "requests_in_work": dispatcher.num_answers,
            "models": {
                name: _health(served, fleet.adapters)
                for name, served in sorted(fleet.models.items())
            },
        }
        return _json(status, shown)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    add_routes(app, fleet, dispatcher.rehearse, dispatcher.max_body_bytes)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _route_error(request, error)

    @app.exception_handler(Exception)
    async def internal_error(_request: Request, error: Exception) -> Response:
        return _error(LaunchError(f"internal error ({type(error).__name__}); see the log"))

    return front


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value), status, headers=headers, media_type="application/json"
    )


def _error(error: LaunchError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        error_body(error), error.http_status, headers=headers, media_type="application/json"
    )


def _route_error(request: Request, error: HTTPException) -> Response:
    method, path = request.method, request.url.path[:200]
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return _error(_NoRoute(f"there is no {method} {path}; see /v1/models for what is served"))
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", ""))
        return _error(_WrongMethod(f"{path} takes {allowed}, not {method}"), headers)
    shape = {"message": str(error.detail), "type": "invalid_request_error"}
    return _json(error.status_code, {"error": {**shape, "param": None, "code": None}}, headers)


def _readiness(fleet: Fleet, dispatcher: Dispatcher) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status, and what is missing or degraded; nothing when all is well."""
    if dispatcher.closing:
        return 503, {"missing": f"the ingress is stopping: {dispatcher.closing}"}
    if any(served.ready for served in fleet.models.values()):
        degraded = {
            name: served.missing
            for name, served in fleet.models.items()
            if served.ready and not served.whole
        }
        for name, served in fleet.models.items():
            if served.ready and served.no_images:
                told = degraded.get(name)
                degraded[name] = f"{told}; {served.no_images}" if told else served.no_images
        degraded |= {
            name: adapter.missing
            for name, adapter in fleet.adapters.items()
            if adapter.base is not None
            and adapter.base.ready
            and not (adapter.ready and adapter.whole)
        }
        return 200, {"degraded": degraded} if degraded else {}
    if not fleet.models:
        return 503, {"missing": "no worker has registered yet"}
    return 503, {"missing": {name: served.missing for name, served in fleet.models.items()}}


def _word(status: int) -> str:
    return "ready" if status == 200 else "not ready"


def _model(served: Served) -> dict[str, Any]:
    base = served.base
    shown = {
        "id": served.name,
        "object": "model",
        "created": served.created_s,
        "owned_by": OWNER,
        "root": served.name if base is None else base.name,
        "parent": None if base is None else base.name,
        "max_model_len": served.max_seq_len,
    }
    if served.max_prompt_len:
        shown["max_prompt_len"] = served.max_prompt_len
    return shown


def _health(served: Served, adapters: Mapping[str, Served]) -> dict[str, Any]:
    shown: dict[str, Any] = {"ready": served.ready}
    if not served.ready or not served.whole:
        shown["missing"] = served.missing
    if served.text is not None:
        shown["encoder"] = served.text.encoder_name
    shown["workers"] = [_worker(worker) for worker in served.workers]
    held = {name: one for name, one in sorted(adapters.items()) if one.base is served}
    if held:
        shown["adapters"] = {name: _adapter(one) for name, one in held.items()}
    return shown


def _adapter(served: Served) -> dict[str, Any]:
    shown: dict[str, Any] = {"ready": served.ready}
    if not served.ready or not served.whole:
        shown["missing"] = served.missing
    shown["workers"] = [worker.worker_id for worker in served.workers]
    return shown


def _worker(worker: Worker) -> dict[str, Any]:
    record, engine = worker.record, worker.record.engine
    shown: dict[str, Any] = {
        "worker_id": worker.worker_id,
        "state": worker.state,
        "role": record.role,
        "engine": engine.engine,
        "device": engine.device,
        "address": str(record.address),
        # Engines that move their own KV were seen to use some wire, or not yet.
        "kv_transport": f"{engine.kv_transport} ({engine.kv_wire})"
        if engine.kv_wire
        else engine.kv_transport,
        "max_seq_len": engine.max_seq_len,
        "streams_from_here": worker.in_flight,
    }
    if engine.vision is not None:
        shown["vision"] = engine.vision.family
    if worker.encodes:
        shown["images_asked_from_here"] = worker.encoding
    if engine.tensor_parallel_size:
        shown["tensor_parallel_size"] = engine.tensor_parallel_size
    if engine.max_prompt_len:
        shown["max_prompt_len"] = engine.max_prompt_len
    if engine.loras:
        shown["loras"] = engine.loras
    if worker.refused or worker.problem:
        shown["problem"] = worker.refused or worker.problem
    if worker.load is not None:
        shown["stats"] = worker.load.stats
        if worker.load.pairs:
            shown["pairs"] = [_pair(pair) for pair in worker.load.pairs]
    return shown


def _pair(pair: PairStats) -> dict[str, Any]:
    shown = {
        "prefill": pair.peer.peer_id,
        "state": pair.state,
        "reason": pair.reason,
        "transport": pair.transport,
        "wire": pair.wire,
        "gb_per_s": round(pair.gb_per_s, 3),
        "handoffs": pair.num_handoffs,
    }
    if pair.transport == ENGINE_NATIVE:
        del shown["gb_per_s"]  # the engine does not tell how many bytes it moved
    return shown
