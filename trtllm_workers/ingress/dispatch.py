"""The story of a request: parse, tokenise, place, send, stream. Knows no route and no socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from trtllm_workers.errors import (
    EngineDead,
    EngineError,
    LaunchError,
    Overloaded,
    PeerLost,
    RequestError,
    TransferError,
    Unavailable,
)
from trtllm_workers.ingress.answer import Answer
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.exchange import Exchange, Receive, Scope, Send
from trtllm_workers.ingress.explain import ASK_HEADER, ROUTE_HEADER, route_header, wants_route
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.job import Job, rest_of
from trtllm_workers.ingress.meters import CLIENT_LEFT, Meters, RequestMeter
from trtllm_workers.ingress.openai import Ask, parse_chat, parse_completion
from trtllm_workers.ingress.placing import Decision
from trtllm_workers.ingress.prompt import budget, tokenize
from trtllm_workers.ingress.responses import Shape
from trtllm_workers.ingress.served import Placement, Served, Worker
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.ingress.sse import Wire, stream_answer
from trtllm_workers.ingress.streams import Streams
from trtllm_workers.ingress.whole import Collected, respond_whole
from trtllm_workers.router.pool import Query
from trtllm_workers.types import GenerateRequest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the two text endpoints."""

    path: str
    parse: Callable[[bytes], Ask]
    id_prefix: str


CHAT = Endpoint("/v1/chat/completions", parse_chat, "chatcmpl-")
COMPLETIONS = Endpoint("/v1/completions", parse_completion, "cmpl-")

# A stream that ended with one of these was a victim: the request itself is as good as before.
_MOVABLE = (PeerLost, EngineDead, Unavailable, TransferError)


class Dispatcher:
    """Answers requests over the fleet's workers."""

    def __init__(
        self, fleet: Fleet, streams: Streams, meters: Meters, settings: IngressSettings
    ) -> None:
        self._fleet = fleet
        self._streams = streams
        self._meters = meters
        self._settings = settings
        self._answers: set[Answer] = set()
        self.closing = ""
        self.idle = asyncio.Event()
        self.idle.set()

    async def serve(self, scope: Scope, receive: Receive, send: Send, endpoint: Endpoint) -> None:
        """Answer one request, whatever happens; every error gets OpenAI's shape."""
        exchange = Exchange(scope, receive, send, self._settings.client_stall_timeout_s)
        meter = self._meters.begin(endpoint.path)
        status = "500"
        try:
            try:
                failure = await self._answer(exchange, endpoint, meter)
            except LaunchError as error:
                failure = error
                await exchange.refuse(error)
            status = _status(exchange, failure)
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        except Exception as error:  # the border: one request must not end the others
            log.exception("request failed in the ingress", request_id=exchange.request_id)
            await self._internal_error(exchange, error)
        finally:
            await exchange.close()
            took_s = meter.end(status)
            if self._settings.access_log:
                log.info(
                    "request",
                    request_id=exchange.request_id,
                    path=endpoint.path,
                    model=meter.model,
                    status=status,
                    seconds=round(took_s, 4),
                )

    async def _internal_error(self, exchange: Exchange, error: Exception) -> None:
        if exchange.status or exchange.gone:
            exchange.drop()  # half a response is out: a cut connection is the honest end
            return
        name = type(error).__name__
        await exchange.refuse(
            EngineError(f"internal error ({name}); the log has more under {exchange.request_id}")
        )

    async def _answer(
        self, exchange: Exchange, endpoint: Endpoint, meter: RequestMeter
    ) -> LaunchError | None:
        """Tell the story. Returns the error that a stream ended with after it had begun."""
        body = await exchange.body(self._settings.max_body_bytes)
        if exchange.gone:
            return None
        self._admit()
        meter.received()
        ask = endpoint.parse(body)
        served = self._fleet.served(ask.model)
        meter.model = served.name
        text = served.text
        assert text is not None, "a model that is ready has its tokenizer"
        max_seq_len = served.max_seq_len
        prompts = await tokenize(ask, text, vocab_size=served.vocab_size, max_seq_len=max_seq_len)
        max_prompt_len = served.max_prompt_len
        budgets = [budget(ask, prompt, max_seq_len, max_prompt_len) for prompt in prompts]
        _check_min_tokens(ask, min(budgets))
        shape = Shape(
            chat=ask.chat,
            response_id=endpoint.id_prefix + exchange.request_id,
            created=int(time.time()),
            model=served.name,
            usage_field=ask.include_usage,
        )
        job = Job(ask, served, text)
        wire = Wire(exchange, shape, self._settings) if ask.stream else None
        sink = Collected() if wire is None else wire
        answer = self._open(exchange, job)
        try:
            if wire is not None:
                wire.answer = answer
            answer.choices_per_prompt = ask.n
            for prompt, max_tokens in zip(prompts, budgets, strict=True):
                answer.prompt_tokens += len(prompt)
                to = self._submit_choices(
                    exchange.request_id, job, answer, sink, prompt, max_tokens
                )
                if to.decision is not None and wants_route(exchange.header(ASK_HEADER)):
                    exchange.more_headers.append((ROUTE_HEADER, route_header(to.decision)))
            meter.accepted(answer)
            echoes = [job.echo(prompt) for prompt in prompts]
            if wire is None:
                assert isinstance(sink, Collected), "answers that are not streamed are collected"
                await respond_whole(exchange, answer, sink, shape, text.decode, echoes)
            else:
                await stream_answer(
                    exchange,
                    answer,
                    wire,
                    shape,
                    opening=job.opening(shape, len(answer.choices), echoes),
                    include_usage=ask.include_usage,
                    fast=partial(job.direct, wire, exchange, shape),
                )
                meter.num_events = wire.num_events + sum(
                    len(choice.token_ids) - choice.num_careful for choice in answer.choices
                )
            return answer.failure
        finally:
            self._close(answer)

    async def rehearse(self, body: bytes) -> Decision:
        """Return where a request of either endpoint would go now; nothing is sent there."""
        self._admit()
        ask = (parse_chat if b'"messages"' in body else parse_completion)(body)
        served = self._fleet.served(ask.model)
        assert served.text is not None, "a model that is ready has its tokenizer"
        prompts = await tokenize(
            ask, served.text, vocab_size=served.vocab_size, max_seq_len=served.max_seq_len
        )
        decision = self._place(served, ask, prompts[0], "").decision
        assert decision is not None, "placements come with their decision"
        return decision

    def _admit(self) -> None:
        if self.closing:
            raise Unavailable(f"the ingress takes no new requests: {self.closing}")
        limit = self._settings.max_concurrency
        if limit and self._meters.num_in_work > limit:
            raise Overloaded(f"{limit} requests are in work already; try again later")

    def _open(self, exchange: Exchange, job: Job) -> Answer:
        """Begin an answer: it has a deadline, and ``_close`` ends it however we leave."""
        move, client_field = partial(self._move, job), job.ask.client_field
        answer = Answer(self._streams, exchange.wake, move, client_field)
        timeout_s = self._settings.request_timeout_s
        answer.timer = asyncio.get_running_loop().call_later(timeout_s, _expire, answer, timeout_s)
        self._answers.add(answer)
        self.idle.clear()
        return answer

    def _close(self, answer: Answer) -> None:
        if answer.timer is not None:
            answer.timer.cancel()
        answer.abandon("client_left")
        self._answers.discard(answer)
        if not self._answers:
            self.idle.set()

    def _submit_choices(
        self,
        request_id: str,
        job: Job,
        answer: Answer,
        sink: Wire | Collected,
        prompt: list[int],
        max_tokens: int,
    ) -> Placement:
        """Send the n choices of one prompt to one worker, and return it: they share its prefix."""
        ask = job.ask
        index = len(answer.choices)
        to = self._place(job.served, ask, prompt, f"{request_id}-{index}")
        for at in range(ask.n):
            index = len(answer.choices)
            request = GenerateRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=prompt,
                sampling=ask.sampling(max_tokens, at),
                cache_salt=ask.cache_salt,
                lora=job.served.lora,
            )
            choice = Choice(
                index=index,
                request=request,
                owner=answer,
                decoder=job.decoder(prompt),
                matcher=job.matcher(),
                token_bytes=job.text.token_bytes if ask.logprobs is not None else None,
                sink=sink,
            )
            if isinstance(sink, Collected) and not ask.stop and ask.logprobs is None:
                choice.be_silent()
            answer.add(choice)
            to = self._send(job.served, ask, choice, request, to)
        return to

    def _send(
        self, served: Served, ask: Ask, choice: Choice, request: GenerateRequest, to: Placement
    ) -> Placement:
        """Send to where it was placed, or elsewhere while connections turn out to be lost."""
        for _ in served.workers:
            try:
                self._streams.submit(choice, to, request)
                return to
            except PeerLost as error:
                log.warning("worker lost", worker_id=to.worker.worker_id, error=str(error))
                to = self._place(
                    served, ask, request.prompt_token_ids, request.request_id, exclude=to.worker
                )
        raise Unavailable(f"no worker of model '{served.name}' can be reached")

    def _place(
        self,
        served: Served,
        ask: Ask,
        prompt: list[int],
        request_id: str,
        exclude: Worker | None = None,
    ) -> Placement:
        return self._fleet.placer.place(
            served,
            ask.fields,
            Query(prompt, cache_salt=ask.cache_salt, lora=served.lora),
            exclude,
            request_id=request_id,
            client_field=ask.client_field,
        )

    def _move(self, job: Job, choice: Choice, worker: Worker | None, error: LaunchError) -> bool:
        """Let a choice go on at another worker, if it can; its client notices nothing.

        The new worker gets the prompt and the tokens so far, when that is still the same request;
        otherwise the choice may start over, as long as nobody has seen any of it.
        """
        if not isinstance(error, _MOVABLE) or choice.moves >= self._settings.migration_limit:
            return False
        request = choice.request
        if not choice.token_ids or job.may_start_over:
            choice.restart(job.decoder(request.prompt_token_ids), job.matcher())
        elif job.may_go_on:
            rest = rest_of(request, choice.token_ids)
            if rest is None:
                choice.finish("length", engine_runs=False)
                return True
            limit = job.served.max_prompt_len
            if 0 < limit < len(rest.prompt_token_ids):
                log.warning(
                    "stream cannot move",
                    request_id=request.request_id,
                    reason="prompt and tokens so far are more than a prompt may have",
                    tokens=len(rest.prompt_token_ids),
                    max_prompt_len=limit,
                )
                return False
            request = rest
        else:
            return False
        choice.moves += 1
        try:
            to = self._place(
                job.served,
                job.ask,
                request.prompt_token_ids,
                request.request_id,
                exclude=worker,
            )
            to = self._send(job.served, job.ask, choice, request, to)
        except LaunchError as nowhere:
            log.warning("stream cannot move", request_id=request.request_id, reason=str(nowhere))
            return False
        self._meters.migrations.add()
        log.info(
            "stream moved",
            request_id=request.request_id,
            worker_id=worker.worker_id if worker is not None else None,
            to_worker_id=to.worker.worker_id,
            tokens=len(choice.token_ids),
        )
        return True

    def worker_lost(self, worker: Worker, error: PeerLost) -> None:
        """Move or fail every stream of a worker that is gone."""
        choices = self._streams.on_worker(worker)
        if choices:
            self._meters.worker_lost.add()
        for choice in choices:
            choice.lost(PeerLost(f"worker {worker.worker_id} was lost: {error}"))

    def abort_all(self, reason: str) -> None:
        """End every answer with an error."""
        for answer in list(self._answers):
            answer.fail(Unavailable(reason), cause="shutdown")

    @property
    def max_body_bytes(self) -> int:
        """Larger request bodies are refused."""
        return self._settings.max_body_bytes

    @property
    def num_answers(self) -> int:
        """Answers that have not ended."""
        return len(self._answers)


def _check_min_tokens(ask: Ask, max_tokens: int) -> None:
    min_tokens = ask.fields.get("min_tokens", 0)
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens ({min_tokens}) is more than can be generated ({max_tokens})",
            param="min_tokens",
        )


def _expire(answer: Answer, timeout_s: float) -> None:
    error = Unavailable(f"the request was not finished after {timeout_s:g} s and was aborted")
    answer.fail(error, cause="timeout")


def _status(exchange: Exchange, failure: LaunchError | None) -> str:
    if exchange.gone:
        return CLIENT_LEFT
    return str(failure.http_status if failure is not None else exchange.status)
