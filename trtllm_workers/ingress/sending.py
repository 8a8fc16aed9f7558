"""A choice on its way to a worker, and on to another when that one fails. Knows no HTTP and no text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import structlog

from trtllm_workers.errors import (
    EngineDead,
    EngineError,
    LaunchError,
    MediaGone,
    PeerLost,
    TransferError,
    Unavailable,
)
from trtllm_workers.ingress.answer import Answer
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.job import Job, rest_of
from trtllm_workers.ingress.meters import Meters
from trtllm_workers.ingress.placing import Placer
from trtllm_workers.ingress.served import Placement, Worker
from trtllm_workers.ingress.streams import Streams
from trtllm_workers.router.pool import Query
from trtllm_workers.types import GenerateRequest, MediaItem

log = structlog.get_logger(__name__)

# A stream that ended with one of these was a victim: the request itself is as good as before.
_MOVABLE = (PeerLost, EngineDead, Unavailable, TransferError)


class Sender:
    """Sends choices. One of them moves at most ``migration_limit`` times."""

    def __init__(
        self, placer: Placer, streams: Streams, meters: Meters, migration_limit: int
    ) -> None:
        self._placer = placer
        self._streams = streams
        self._meters = meters
        self._migration_limit = migration_limit

    def place(
        self,
        job: Job,
        prompt: Sequence[int],
        media: Sequence[MediaItem] = (),
        request_id: str = "",
        exclude: Worker | None = None,
    ) -> Placement:
        """Return the workers of a prompt. Raises as Placer.place."""
        ask, served = job.ask, job.served
        return self._placer.place(
            served,
            ask.fields,
            Query(prompt, cache_salt=ask.cache_salt, lora=served.lora, media=media),
            exclude,
            request_id=request_id,
            client_field=ask.client_field,
        )

    def send(self, job: Job, choice: Choice, request: GenerateRequest, to: Placement) -> Placement:
        """Send to where it was placed, or elsewhere while connections turn out to be lost."""
        for _ in job.served.workers:
            try:
                self._streams.submit(choice, to, request)
                return to
            except PeerLost as error:
                log.warning("worker lost", worker_id=to.worker.worker_id, error=str(error))
                to = self._place_again(job, request, to.worker)
        raise Unavailable(f"no worker of model '{job.served.name}' can be reached")

    def _place_again(self, job: Job, request: GenerateRequest, worker: Worker | None) -> Placement:
        return self.place(
            job, request.prompt_token_ids, request.media, request.request_id, exclude=worker
        )

    def move(
        self, job: Job, answer: Answer, choice: Choice, worker: Worker | None, error: LaunchError
    ) -> bool:
        """Let a choice go on at another worker, if it can; its client notices nothing.

        The new worker gets the prompt and the tokens so far, when that is still the same request;
        otherwise the choice may start over, as long as nobody has seen any of it.
        """
        if not isinstance(error, _MOVABLE) or choice.moves >= self._migration_limit:
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
        if request.media:
            # Its images may have to be made again, and that takes a while.
            work = self._move_with_images(job, answer, choice, request, worker, error)
            answer.start(work, f"move-{request.request_id}")
            return True
        return self._send_again(job, choice, request, worker)

    def _send_again(
        self, job: Job, choice: Choice, request: GenerateRequest, worker: Worker | None
    ) -> bool:
        try:
            to = self.send(job, choice, request, self._place_again(job, request, worker))
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

    async def _move_with_images(
        self,
        job: Job,
        answer: Answer,
        choice: Choice,
        request: GenerateRequest,
        worker: Worker | None,
        error: LaunchError,
    ) -> None:
        """Send a choice again once its images are there; its answer fails when that cannot be."""
        assert job.images is not None, "a request with items has its images"
        gone = isinstance(error, MediaGone)
        try:
            media = await job.images.renewed(request.media, gone=gone)
            if answer.failure is not None or choice.finish_reason is not None:
                return
            choice.request = msgspec.structs.replace(choice.request, media=media)
            request = msgspec.structs.replace(request, media=media)
            # Without its images a worker could not go on: that is no fault of its own.
            if not self._send_again(job, choice, request, None if gone else worker):
                answer.worker_failed(error)
        except LaunchError as failure:
            log.warning("images cannot be had again", request_id=request.request_id, error=failure)
            answer.fail(failure, cause="worker_failed")
        except Exception as fault:  # the border: this one request must not be left waiting
            log.exception("stream cannot move", request_id=request.request_id)
            answer.fail(EngineError(f"internal error ({fault!r})"), cause="worker_failed")
