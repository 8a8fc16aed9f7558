"""Which workers take a request: the rules of roles and strategies around the router's choice.

The router (``router/``) knows costs; this knows connections, capabilities, pairs and strategies. It keeps
the last decisions, so that each can be explained.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from trtllm_workers.errors import NotSupported, Unavailable
from trtllm_workers.ingress.served import Placement, Served, Worker
from trtllm_workers.router.pool import Charge, Choice, Pool, Query
from trtllm_workers.router.router import Router
from trtllm_workers.types import Address, MediaItem, Role, Strategy

# Capability → what an operator does to have it, where that is more than another engine.
_REMEDIES = {
    "guided": "; guided decoding needs workers of engine trtllm whose engine config sets "
    "guided_decoding_backend",
}
_DECISIONS_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Decision:
    """Why a request went where it did. ``maker`` streams its tokens; ``why_local`` says why no prefill
    worker was chosen for a decode worker, "" when one was or none is needed.
    """

    request_id: str
    model: str
    at_s: float
    strategy: str
    maker: Choice
    prefill: Choice | None
    why_local: str = ""


@dataclass(slots=True)
class Decisions:
    """The last decisions of this ingress, by request id."""

    _by_id: dict[str, Decision] = field(default_factory=dict)
    _order: deque[str] = field(default_factory=deque)

    def note(self, decision: Decision) -> None:
        """Keep a decision; the oldest one goes. A request that moved keeps its last one."""
        if decision.request_id not in self._by_id:
            self._order.append(decision.request_id)
            if len(self._order) > _DECISIONS_KEPT:
                self._by_id.pop(self._order.popleft(), None)
        self._by_id[decision.request_id] = decision

    def find(self, request_id: str) -> Decision | None:
        """Return the decision of a request, or that of its first choice."""
        return self._by_id.get(request_id) or self._by_id.get(f"{request_id}-0")

    def last(self, count: int) -> list[Decision]:
        """Return the youngest decisions, the youngest first."""
        return [self._by_id[one] for one in reversed(self._order)][:count]


class Placer:
    """Chooses workers for requests over a router. Knows no connection's bytes."""

    def __init__(self, router: Router, strategy: Strategy) -> None:
        self.router = router
        self.decisions = Decisions()
        self._strategy = strategy

    def makers(self, model: str) -> Pool:
        """Return the pool of a base model's workers that stream tokens."""
        return self.router.pool((model, "makers"))

    def prefills(self, model: str) -> Pool:
        """Return the pool of a base model's prefill workers."""
        return self.router.pool((model, "prefills"))

    def pool_of(self, worker: Worker) -> Pool:
        """Return the pool that a worker belongs to; that of encode workers has none to place at."""
        model = worker.record.model
        if worker.role is Role.ENCODE:
            return self.router.pool((model, "encoders"))
        return self.prefills(model) if worker.role is Role.PREFILL else self.makers(model)

    def place(
        self,
        served: Served,
        needs: Collection[str],
        query: Query,
        exclude: Worker | None = None,
        *,
        request_id: str = "",
        client_field: Callable[[str], str] = str,
    ) -> Placement:
        """Return the workers of a request.

        Raises Unavailable when none takes requests, NotSupported naming the first sampling field
        of ``needs`` that none of them honours, as the client called it (``client_field``).
        """
        by_address = served.by_address
        media = query.media
        allowed = self._able(served, needs, exclude, client_field, media)
        base = served.base_name
        not_this = exclude.record.address if exclude is not None else None
        chosen = self.makers(base).place(query, allowed=allowed, exclude=not_this)
        if chosen is None and exclude is not None and exclude.role is Role.DECODE:
            # It may have been the prefill worker's fault, and there is no other decode worker.
            chosen = self.makers(base).place(query, allowed=allowed)
        if chosen is None and allowed is not None:  # only unpaired ones can be reached
            able = self._able(served, needs, None, client_field, media, paired=False)
            chosen = self.makers(base).place(query, allowed=able, exclude=not_this)
        if chosen is None:
            raise Unavailable(f"model '{served.name}' has no worker left: {served.missing}")
        maker = by_address[chosen.address]
        prefill, why_local = self._prefill(served, needs, query, maker, chosen, exclude)
        decision = Decision(
            request_id,
            served.name,
            time.time(),
            str(self._strategy) if maker.role is Role.DECODE else "aggregated",
            chosen,
            prefill,
            why_local,
        )
        first = by_address[prefill.address] if prefill is not None else None
        if first is not None and self._strategy is Strategy.PREFILL_FIRST:
            placement = Placement(first, maker, decision=decision, query=query)
        else:
            placement = Placement(maker, prefill=first, decision=decision, query=query)
        return placement

    def charge(self, to: Placement) -> tuple[Charge, ...]:
        """Take notice that a request was sent there; the charges are to be ended with it."""
        decision, query = to.decision, to.query
        if decision is None or query is None:
            return ()
        maker = to.decode or to.worker
        charges = [self.pool_of(maker).charge(decision.maker, query)]
        maker.count_decision(decision.maker)
        if decision.prefill is not None:
            prefill = to.worker if to.decode is not None else to.prefill
            assert prefill is not None, "a choice of a prefill worker has its worker"
            charges.append(self.pool_of(prefill).charge(decision.prefill, query))
            prefill.count_decision(decision.prefill)
        if decision.request_id:
            self.decisions.note(decision)
        return tuple(charges)

    def _able(
        self,
        served: Served,
        needs: Collection[str],
        exclude: Worker | None,
        client_field: Callable[[str], str],
        media: Sequence[MediaItem],
        *,
        paired: bool = True,
    ) -> Collection[Address] | None:
        """Return the makers that can take the request, None for all of the pool."""
        if media or not served.common_capabilities.issuperset(needs):
            able = [worker for worker in served.makers if worker.takes_requests]
            if media:
                able = [worker for worker in able if _takes(worker, media)]
            others = [worker for worker in able if worker is not exclude] or able
            for need in needs:
                others = [one for one in others if need in one.record.engine.capabilities]
                if able and not others:
                    named = client_field(need)
                    raise NotSupported(
                        f"'{named}' is not supported by the engine that serves '{served.name}'"
                        + _REMEDIES.get(need, ""),
                        param=named,
                    )
            both = [one for one in others if served.can_prefill_for(one)] if paired else []
            return frozenset(one.record.address for one in both or others)
        if paired and served.paired_makers is not None:
            return served.paired_makers
        return served.holders

    def _prefill(
        self,
        served: Served,
        needs: Collection[str],
        query: Query,
        maker: Worker,
        chosen: Choice,
        exclude: Worker | None,
    ) -> tuple[Choice | None, str]:
        """Return the prefill worker for a decode worker, and why there is none."""
        if maker.role is not Role.DECODE:
            return None, ""
        if maker.record.queues_prefill:
            return None, "the prompt waits in the prefill queue"
        uncached = len(query.prompt_token_ids) - chosen.overlap_tokens
        if uncached <= maker.record.max_local_prefill_length:
            return None, f"{uncached} uncached tokens are few enough for the decode worker itself"
        allowed: Collection[Address] = maker.ready_pairs
        media = query.media
        special = media or served.base is not None
        if special or not served.prefill_capabilities.issuperset(needs):
            # It chooses the first token. When none can, decode computes the prompt itself.
            allowed = frozenset(
                worker.record.address
                for worker in served.workers
                if worker.role is Role.PREFILL
                and worker.record.address in maker.ready_pairs
                and all(need in worker.record.engine.capabilities for need in needs)
                and (not media or _takes(worker, media))
            )
        not_this = exclude.record.address if exclude is not None else None
        found = self.prefills(served.base_name).place(query, allowed=allowed, exclude=not_this)
        return found, "" if found is not None else "no prefill worker is ready for it"


def _takes(worker: Worker, media: Sequence[MediaItem]) -> bool:
    """True when a worker can compute a prompt with these images.

    An engine's own handle of one is good on its holder's host. A decode worker needs none: its prefill
    worker computes the prompt.
    """
    if worker.record.engine.vision is None:
        return False
    if worker.role is Role.DECODE:
        return True
    host = worker.record.address.host
    return not any(
        item.native and item.holder is not None and item.holder.host != host for item in media
    )
