"""A served model as this ingress sees it: its text side, its workers, and whether a chain is whole.

An adapter is served as a model of its own, by those workers of its base model that hold it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_workers.ingress.text import TextModel
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.messages import WorkerStats
from trtllm_workers.types import Address, Role, VisionInfo, WorkerRecord, WorkerState

if TYPE_CHECKING:
    from trtllm_workers.ingress.placing import Decision
    from trtllm_workers.router.pool import Choice, Query

_MAKERS = (Role.AGGREGATED, Role.DECODE)


class Worker:
    """One worker as this ingress sees it. ``in_flight`` counts our own streams on it.

    ``events_turn`` numbers our asks for its KV events; ``waits_for_events`` is true while the router
    needs a snapshot of them that has not come. ``refused`` says why it may not serve its model's name.
    ``decisions`` counts choices of it by router mode. ``encoding`` counts our asks for images there that
    have no answer.
    """

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record
        self.peer: Peer | None = None
        self.in_flight = 0
        self.draining = record.state is not WorkerState.READY
        self.problem = "not connected yet"
        self.load: WorkerStats | None = None
        self.lost = asyncio.Event()
        self.ready_pairs: frozenset[Address] = frozenset()
        self.events_turn = 0
        self.waits_for_events = False
        self.refused = ""
        self.num_resyncs = 0
        self.decisions: Counter[str] = Counter()
        self.overlap_tokens = 0
        self.placed_tokens = 0
        self.encoding = 0

    @property
    def worker_id(self) -> str:
        """The worker's name in discovery."""
        return self.record.worker_id

    @property
    def role(self) -> Role:
        """What it does."""
        return self.record.role

    @property
    def encodes(self) -> bool:
        """True when it makes items of images."""
        vision = self.record.engine.vision
        return vision is not None and vision.encodes

    @property
    def takes_requests(self) -> bool:
        """True while a new request may be sent to it."""
        return (
            self.peer is not None
            and not self.draining
            and not self.waits_for_events
            and not self.refused
        )

    @property
    def state(self) -> str:
        """What people are shown."""
        if self.peer is None:
            return "unreachable"
        if self.draining:
            return "draining"
        if self.refused:
            return "refused"
        return "without KV events" if self.waits_for_events else "ready"

    def count_decision(self, choice: Choice) -> None:
        """Take notice that the router sent a prompt here."""
        self.decisions[str(choice.mode)] += 1
        self.overlap_tokens += choice.overlap_tokens
        self.placed_tokens += choice.prompt_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: to ``worker``, which with ``decode`` set prefills and hands over to that.

    ``prefill`` is the prefill worker that ``worker``, a decode worker, shall ask.
    """

    worker: Worker
    decode: Worker | None = None
    prefill: Worker | None = None
    decision: Decision | None = None
    query: Query | None = None


@dataclass(slots=True)
class TextSide:
    """A base model's tokenizer and template, once loaded; its adapters share it."""

    model: TextModel | None = None
    problem: str = "its tokenizer is being loaded"


class Served:
    """One served model: its text side and its workers, of whatever role.

    With ``base`` it is an adapter of that model, and ``workers`` are only those that hold it. Encode
    workers are among ``workers``, but stand beside the ``chain`` that generates: they have no say in what
    the model can do, or whether it is there.
    """

    def __init__(self, name: str, base: Served | None = None) -> None:
        self.name = name
        self.base = base
        self.text_side: TextSide = TextSide() if base is None else base.text_side
        self.created_s = 0
        self.workers: list[Worker] = []
        self.has_been_whole = False
        self.refresh()

    def refresh(self) -> None:
        """Work out what every placement looks at; to be called when workers or pairs change.

        ``holders`` are the makers that a request may go to (None: all of the model's), and
        ``paired_makers`` those of them that need not prefill alone (None: all, or none). ``vision`` is
        what the makers know of images, None: they take text only.
        """
        self.chain = [worker for worker in self.workers if worker.role is not Role.ENCODE]
        self._refuse_strangers()
        makers = self.makers
        visions = (worker.record.engine.vision for worker in makers)
        self.vision: VisionInfo | None = next((one for one in visions if one is not None), None)
        prefills = [worker for worker in self.workers if worker.role is Role.PREFILL]
        self.by_address = {worker.record.address: worker for worker in self.workers}
        self.common_capabilities = _common(makers)
        self.prefill_capabilities = _common(prefills)
        self.holders = None if self.base is None else _addresses(makers)
        paired = [worker for worker in makers if self.can_prefill_for(worker)]
        some = 0 < len(paired) < len(makers)
        self.paired_makers = _addresses(paired) if some else None

    def _refuse_strangers(self) -> None:
        """Let only workers of one checkpoint serve one name: that of the worker that came first."""
        if self.base is not None or not self.workers:
            return
        among = self.chain or self.workers
        first = min(among, key=lambda worker: worker.record.started_at_s).record
        for worker in self.workers:
            theirs = worker.record.engine.model_id
            worker.refused = (
                ""
                if theirs == first.engine.model_id
                else f"it serves another checkpoint ({theirs}) under the name '{self.name}' than "
                f"{first.worker_id} ({first.engine.model_id}); give it another --served-model-name"
            )

    @property
    def base_name(self) -> str:
        """The name of the base model."""
        return self.name if self.base is None else self.base.name

    def can_prefill_for(self, maker: Worker) -> bool:
        """True when a prompt for ``maker`` can be computed where it should be."""
        return maker.role is not Role.DECODE or self.is_paired(maker)

    @property
    def lora(self) -> str:
        """The adapter that its requests name; "" for a base model."""
        return "" if self.base is None else self.name

    @property
    def text(self) -> TextModel | None:
        """Tokenizer and template, once loaded."""
        return self.text_side.model

    @property
    def ready(self) -> bool:
        """True when a request for it can be served.

        That takes a whole chain once: an aggregated worker, or a decode worker with a prefill worker
        that has passed its gate. When all prefill workers go later, decode workers do their work.
        """
        if self.text is None or not (self.has_been_whole or self.whole):
            return False
        return any(worker.takes_requests for worker in self.makers)

    @property
    def whole(self) -> bool:
        """True when a chain is up from the first worker to the last."""
        return any(worker.takes_requests and self.can_prefill_for(worker) for worker in self.makers)

    def is_paired(self, decode: Worker) -> bool:
        """True when ``decode`` has a prefill worker for this model; an adapter's must hold it too."""
        if self.base is None:
            return bool(decode.ready_pairs)
        return any(
            worker.role is Role.PREFILL and worker.record.address in decode.ready_pairs
            for worker in self.workers
        )

    @property
    def makers(self) -> list[Worker]:
        """The workers that stream tokens: aggregated and decode ones."""
        return [worker for worker in self.workers if worker.role in _MAKERS]

    def encoders(self, but: Collection[Worker] = ()) -> list[Worker]:
        """Return who can make items of images now; encode workers alone while there are any.

        Else those that compute prompts. Workers of ``but`` do not count.
        """
        base = self if self.base is None else self.base
        able = [one for one in base.workers if one.encodes and one not in but]
        ready = [one for one in able if one.takes_requests]
        return [one for one in ready if one.role is Role.ENCODE] or [
            one for one in ready if one.role is not Role.DECODE
        ]

    @property
    def no_images(self) -> str:
        """Why a model that takes images cannot take any now, for people; "" when it can."""
        if self.vision is None or self.encoders():
            return ""
        base = self if self.base is None else self.base
        problems = [
            f"{one.worker_id} is {one.state}: {one.refused or one.problem}"
            for one in base.workers
            if one.encodes and one.role is not Role.DECODE
        ]
        why = "; ".join(problems) or "none has registered"
        return f"no encode worker of '{self.name}' is ready ({why})"

    @property
    def max_seq_len(self) -> int:
        """What every worker of this model can hold, in tokens."""
        return min(worker.record.engine.max_seq_len for worker in self.chain)

    @property
    def max_prompt_len(self) -> int:
        """The longest prompt whose KV every worker of this model can move; 0 = no such limit."""
        limits = (worker.record.engine.max_prompt_len for worker in self.chain)
        return min((limit for limit in limits if limit), default=0)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return min(worker.record.engine.vocab_size for worker in self.chain)

    @property
    def missing(self) -> str:
        """Why it is not ready, or not whole, for people."""
        if self.base is None and not self.chain:
            return "only encode workers have registered"
        if self.text is None:
            return self.text_side.problem
        problems = [
            f"worker {worker.worker_id} is {worker.state}: {worker.refused or worker.problem}"
            for worker in self.chain
            if not worker.takes_requests
        ]
        problems += [
            f"decode worker {worker.worker_id} has no prefill worker{self._why_unpaired(worker)}"
            for worker in self.makers
            if worker.takes_requests and worker.role is Role.DECODE and not self.is_paired(worker)
        ]
        if not self.makers:
            problems.append(
                "no decode worker has registered"
                if self.base is None
                else f"no aggregated or decode worker of '{self.base.name}' holds this adapter"
            )
        return "; ".join(problems) or "no worker serves it"

    def _why_unpaired(self, decode: Worker) -> str:
        if decode.load is None:
            return ": it has not told yet"
        if self.base is not None and decode.ready_pairs:
            return " that holds this adapter"
        pairs = [f"{one.peer.peer_id} {one.state}: {one.reason}" for one in decode.load.pairs]
        return ": " + ("; ".join(pairs) or "none has registered")


def _common(workers: list[Worker]) -> frozenset[str]:
    """Return the capabilities that all of the workers have."""
    each = [frozenset(worker.record.engine.capabilities) for worker in workers]
    return frozenset.intersection(*each) if each else frozenset()


def _addresses(workers: list[Worker]) -> frozenset[Address]:
    return frozenset(worker.record.address for worker in workers)
