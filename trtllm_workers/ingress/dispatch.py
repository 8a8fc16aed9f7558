"""The story of a request: parse, encode its images, tokenise, place, send, stream.

Knows no route and no socket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from trtllm_workers.errors import (
    EngineError,
    LaunchError,
    Overloaded,
    PeerLost,
    RequestError,
    Unavailable,
)
from trtllm_workers.ingress.answer import Answer
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.encoders import Encoders
from trtllm_workers.ingress.exchange import Exchange, Receive, Scope, Send
from trtllm_workers.ingress.explain import ASK_HEADER, ROUTE_HEADER, route_header, wants_route
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.images import Images
from trtllm_workers.ingress.job import Job
from trtllm_workers.ingress.meters import CLIENT_LEFT, Meters, RequestMeter
from trtllm_workers.ingress.openai import Ask, parse_chat, parse_completion
from trtllm_workers.ingress.placeholders import check_images
from trtllm_workers.ingress.placing import Decision
from trtllm_workers.ingress.prompt import Items, Prompt, budget, tokenize
from trtllm_workers.ingress.responses import Shape
from trtllm_workers.ingress.sending import Sender
from trtllm_workers.ingress.served import Placement, Served, Worker
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.ingress.sse import Wire, stream_answer
from trtllm_workers.ingress.streams import Streams
from trtllm_workers.ingress.text import TextModel
from trtllm_workers.ingress.whole import Collected, respond_whole
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


class Dispatcher:
    """Answers requests over the fleet's workers."""

    def __init__(
        self,
        fleet: Fleet,
        streams: Streams,
        encoders: Encoders,
        meters: Meters,
        settings: IngressSettings,
    ) -> None:
        self._fleet = fleet
        self._streams = streams
        self._encoders = encoders
        self._meters = meters
        self._sender = Sender(fleet.placer, streams, meters, settings.migration_limit)
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
        del body  # with images in it, it is large, and nobody needs it any more
        served = self._fleet.served(ask.model)
        meter.model = served.name
        job = Job(ask, served, _text(served), self._images(served, ask))
        shape = Shape(
            chat=ask.chat,
            response_id=endpoint.id_prefix + exchange.request_id,
            created=int(time.time()),
            model=served.name,
            usage_field=ask.include_usage,
        )
        wire = Wire(exchange, shape, self._settings) if ask.stream else None
        sink = Collected() if wire is None else wire
        answer = self._open(exchange, job)
        try:
            items: Items = ()
            if job.images is not None:
                items = await self._items(exchange, job.images, answer)
                if exchange.gone:
                    return None
            prompts, budgets = await _tokenized(job, items)
            if answer.failure is not None:
                raise answer.failure
            if wire is not None:
                wire.answer = answer
            answer.choices_per_prompt = ask.n
            for prompt, max_tokens in zip(prompts, budgets, strict=True):
                answer.prompt_tokens += len(prompt.token_ids)
                to = self._submit_choices(
                    exchange.request_id, job, answer, sink, prompt, max_tokens
                )
                if to.decision is not None and wants_route(exchange.header(ASK_HEADER)):
                    exchange.more_headers.append((ROUTE_HEADER, route_header(to.decision)))
            answer.sent()
            meter.accepted(answer)
            echoes = [job.echo(prompt.token_ids) for prompt in prompts]
            if wire is None:
                assert isinstance(sink, Collected), "answers that are not streamed are collected"
                await respond_whole(exchange, answer, sink, shape, job.text.decode, echoes)
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
            if job.images is not None:
                await _let_go(answer, job.images)

    def _images(self, served: Served, ask: Ask) -> Images | None:
        """Return the images of a request, if it has any. Raises RequestError when they cannot be taken."""
        if not ask.references:
            return None
        vision = check_images(ask, _text(served).template, served.vision)
        timeout_s = self._settings.encode_timeout_s
        return Images(self._encoders, served, ask.references, vision, timeout_s)

    async def _items(self, exchange: Exchange, images: Images, answer: Answer) -> Items:
        """Return what the images of a request became. Ends early when its client leaves."""
        encoding = answer.start(images.encode(), f"encode-{exchange.request_id}")
        while not (encoding.done() or answer.over):
            await exchange.woken()
            if exchange.gone:
                return ()
        if answer.failure is not None:
            raise answer.failure
        return encoding.result()

    async def rehearse(self, body: bytes) -> Decision:
        """Return where a request of either endpoint would go now; nothing is sent there."""
        self._admit()
        ask = (parse_chat if b'"messages"' in body else parse_completion)(body)
        served = self._fleet.served(ask.model)
        images = self._images(served, ask)
        job = Job(ask, served, _text(served), images)
        try:
            items = await images.encode() if images is not None else ()
            prompts, _ = await _tokenized(job, items)
            decision = self._sender.place(job, prompts[0].token_ids, prompts[0].media).decision
        finally:
            if images is not None:
                images.close()
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
        move, client_field = partial(self._sender.move, job), job.ask.client_field
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
        prompt: Prompt,
        max_tokens: int,
    ) -> Placement:
        """Send the n choices of one prompt to one worker, and return it: they share its prefix."""
        ask = job.ask
        index = len(answer.choices)
        token_ids = prompt.token_ids
        to = self._sender.place(job, token_ids, prompt.media, f"{request_id}-{index}")
        for at in range(ask.n):
            index = len(answer.choices)
            request = GenerateRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=token_ids,
                sampling=ask.sampling(max_tokens, at),
                cache_salt=ask.cache_salt,
                lora=job.served.lora,
                media=prompt.media,
                prompt_text=prompt.text,
            )
            choice = Choice(
                index=index,
                request=request,
                owner=answer,
                decoder=job.decoder(token_ids),
                matcher=job.matcher(),
                token_bytes=job.text.token_bytes if ask.logprobs is not None else None,
                sink=sink,
            )
            if isinstance(sink, Collected) and not ask.stop and ask.logprobs is None:
                choice.be_silent()
            answer.add(choice)
            to = self._sender.send(job, choice, request, to)
        return to

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


def _text(served: Served) -> TextModel:
    assert served.text is not None, "a model that is ready has its tokenizer"
    return served.text


async def _let_go(answer: Answer, images: Images) -> None:
    try:
        await answer.end_work()
    finally:
        images.close()


async def _tokenized(job: Job, items: Items) -> tuple[list[Prompt], list[int]]:
    """Return every prompt, and how many tokens may be generated for each. Raises RequestError."""
    ask, served = job.ask, job.served
    if not served.chain:  # they left while the images were encoded
        raise Unavailable(f"model '{served.name}' has no worker left: {served.missing}")
    max_seq_len, max_prompt_len = served.max_seq_len, served.max_prompt_len
    prompts = await tokenize(
        ask,
        job.text,
        vocab_size=served.vocab_size,
        max_seq_len=max_seq_len,
        vision=served.vision if job.images is None else job.images.vision,
        items=items,
    )
    if job.images is not None:
        job.images.placed(prompts[0].media)
    budgets = [budget(ask, prompt, max_seq_len, max_prompt_len) for prompt in prompts]
    _check_min_tokens(ask, min(budgets))
    return prompts, budgets


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
