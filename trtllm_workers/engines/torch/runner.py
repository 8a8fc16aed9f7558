"""The engine's thread: loads, then steps while there is work. Knows the loop only as ``post``.

Orders come through one queue and take effect between steps; what a step made leaves in one ``post``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.event_log import Change
from trtllm_workers.engines.torch.core import Core, Result
from trtllm_workers.engines.torch.loading import load
from trtllm_workers.engines.torch.lockstep import Leader
from trtllm_workers.engines.torch.orders import Add, Order, carry_out
from trtllm_workers.engines.torch.ranks import ALONE, join
from trtllm_workers.engines.torch.settings import num_threads_of
from trtllm_workers.engines.torch.streams import Stream
from trtllm_workers.engines.torch.threads import ThreadGovernor
from trtllm_workers.engines.torch.vision.loading import Vision
from trtllm_workers.errors import EngineDead, LaunchError, StartError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import EngineInfo, EngineStats, FinishReason, Reservation, TokenChunk

log = get_logger(__name__)

Results = list[tuple[Stream, Result]]


@dataclass(slots=True)
class Outcome:
    """What the loop is told after a step. ``num_taken`` counts streams taken off the queue so far."""

    results: Results = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)
    num_taken: int = 0
    death: EngineDead | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded engine; ``kv_pool`` is None where its blocks are not in host memory."""

    info: EngineInfo
    kv_pool: KvPool | None
    vision: Vision | None = None


@dataclass(frozen=True, slots=True)
class _Ask:
    """A question to the thread; answered between steps, and not at all once it has ended."""

    answer: Callable[[Mapping[str, int]], None]


Started = Ready | LaunchError

# How soon a thread that waits for a stalled loop notices that it should end.
_LOOK_AROUND_S = 0.2


class _Stopped(Exception):
    """``stop`` was called while the model was loading."""


class Runner:
    """Owns the thread. ``started``, ``post`` and ``ended`` are called in it.

    ``started`` comes once; unless it brought an error, ``post`` follows any number of times.
    ``ended`` is the thread's last act.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        started: Callable[[Started], None],
        post: Callable[[Outcome], None],
        ended: Callable[[], None],
    ) -> None:
        self._options = options
        self._started = started
        self._post = post
        self._ended = ended
        self._orders: queue.SimpleQueue[Order[Stream] | _Ask | None] = queue.SimpleQueue()
        self._asked: list[_Ask] = []
        self._ranks = ALONE
        self._stopping = threading.Event()
        self._num_taken = 0
        self._room = threading.Semaphore(1)
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    def order(self, order: Order[Stream]) -> None:
        """Queue an order; it takes effect between two steps."""
        self._orders.put(order)

    def ask_holdings(self, answer: Callable[[Mapping[str, int]], None]) -> None:
        """Have ``answer`` called in the thread with ``Core.holdings``; never, if the thread ends."""
        self._orders.put(_Ask(answer))

    def applied(self) -> None:
        """Say that the loop has dealt with one ``post``.

        The thread computes the next step meanwhile, but posts it only then: running further ahead
        of a loop that is late would delay aborts and pile up tokens.
        """
        self._room.release()

    def stop(self) -> None:
        """Ask the thread to end after the step at hand; all streams end with ABORT."""
        self._stopping.set()
        self._orders.put(None)

    def give_up(self) -> None:
        """Leave a thread that hangs; other ranks, if any, end with this process."""
        self._ranks.abort_at_exit()

    def join(self) -> None:
        """Wait for the thread; call after ``ended``, when it takes no time."""
        self._thread.join()

    # --- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            core = self._load()
            if core is not None:
                self._serve(core)
        finally:
            self._ended()

    def _load(self) -> Core[Stream] | None:
        config = self._options.config
        try:
            ranks = self._ranks = join(config["tensor_parallel_size"])
            num_threads = ranks.together(lambda: num_threads_of(self._options.extra))
            loaded = load(
                self._options.model_path,
                config,
                self._progress,
                num_threads,
                ranks,
                media=self._options.media,
                encodes=self._options.encodes,
            )
        except LaunchError as error:
            self._started(error)
            return None
        except _Stopped:
            self._started(StartError("the engine was closed while it was loading"))
            return None
        except Exception as error:  # the thread's border: start() raises it
            log.error("loading failed", exc_info=True)
            self._ranks.abort_at_exit()
            self._started(StartError(f"the torch engine could not load its model: {error!r}"))
            return None
        core: Core[Stream] = Core(
            loaded,
            chunked_prefill=config["enable_chunked_prefill"],
            reuse=config["kv_cache_config.enable_block_reuse"],
        )
        self._tell(core, [])
        self._started(Ready(loaded.info, loaded.kv_pool(), loaded.vision))
        return core

    def _progress(self, share: float) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._options.on_progress(share)

    def _serve(self, core: Core[Stream]) -> None:
        may_change = core.loaded.any_num_threads
        num_threads = torch.get_num_threads() if may_change else 1  # the governor leaves 1 alone
        governor = ThreadGovernor(num_threads, torch.set_num_threads)
        leader = Leader(self._ranks)
        try:
            while not self._stopping.is_set():
                results = self._take_orders(core, leader)
                if not core.is_idle and not self._stopping.is_set():
                    leader.go(core)
                    results += core.plan()
                if core.has_step:
                    if any(isinstance(result, Reservation) for _stream, result in results):
                        # Whoever reserved starts a transfer now, while this step computes.
                        self._tell(core, results)
                        results = []
                    governor.before_step()
                    chosen = core.compute()
                    leader.chose(chosen)
                    results += core.finish(chosen)
                    governor.after_step()
                self._tell(core, results)
                while self._asked:  # after the step's stats, so that the two agree
                    self._asked.pop().answer(core.holdings())
            leader.stop()
            self._tell(core, [*core.abort_all()])
        except Exception as error:  # the thread's border: the engine dies of it
            log.error("the engine died", exc_info=True)
            self._ranks.abort_at_exit()
            death = EngineDead(f"the torch engine cannot go on: a step failed with {error!r}")
            self._tell(core, [(s, _dead(c, death)) for s, c in core.abort_all()], death)

    def _take_orders(self, core: Core[Stream], leader: Leader) -> Results:
        """Take all orders there are; wait for one when there is nothing else to do."""
        ended: Results = []
        took_any = False
        while not self._stopping.is_set():
            try:
                order = self._orders.get(block=core.is_idle and not took_any)
            except queue.Empty:
                break
            if order is None:
                break
            took_any = True
            if isinstance(order, _Ask):
                self._asked.append(order)
                continue
            self._num_taken += isinstance(order, Add)
            leader.took(order)
            chunk = carry_out(core, order)
            if chunk is not None:
                ended.append((order.key, chunk))
        return ended

    def _tell(
        self,
        core: Core[Stream],
        results: Results,
        death: EngineDead | None = None,
    ) -> None:
        while not self._room.acquire(timeout=_LOOK_AROUND_S):
            if self._stopping.is_set():
                break
        self._post(Outcome(results, core.pool.take_changes(), core.stats(), self._num_taken, death))


def _dead(chunk: TokenChunk, death: EngineDead) -> TokenChunk:
    return TokenChunk(
        (),
        finish_reason=FinishReason.ERROR,
        cached_tokens=chunk.cached_tokens,
        error_code=EngineDead.code,
        error_message=str(death),
    )
