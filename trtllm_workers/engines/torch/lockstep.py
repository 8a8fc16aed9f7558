"""How all ranks take the same steps: rank 0 tells what it took, the others do the same.

Rank 0 decides when to step, takes the orders and samples. Every rank has a scheduler of its own, which
decides from orders and tokens alone; so one message per step is enough for all to hold the same
blocks. Knows no MPI: ``Ranks`` carries the messages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trtllm_workers.engines.torch.core import Core
from trtllm_workers.engines.torch.orders import Order, carry_out
from trtllm_workers.engines.torch.ranks import Ranks
from trtllm_workers.engines.torch.sampling import Sampled
from trtllm_workers.engines.torch.streams import Stream


@dataclass(frozen=True, slots=True)
class Go:
    """What followers do before they step again.

    ``chosen`` are the last step's tokens, or None when there was none since the last message;
    ``state`` is what rank 0's core looks like after the orders.
    """

    chosen: list[Sampled] | None
    orders: list[Order[int]]
    state: tuple[int, ...]


class Leader:
    """Rank 0's side: collects what happened and tells it before the next step. Alone it is idle."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._has_followers = ranks.size > 1
        self._chosen: list[Sampled] | None = None
        self._orders: list[Order[int]] = []

    def took(self, order: Order[Stream]) -> None:
        """Note an order that was carried out here."""
        if self._has_followers:
            self._orders.append(replace(order, key=order.key.number))  # type: ignore[arg-type]

    def chose(self, chosen: list[Sampled]) -> None:
        """Note the tokens of the step that was just computed."""
        if self._has_followers:
            # Log probabilities are for the caller alone.
            self._chosen = [Sampled(found.token, error=found.error) for found in chosen]

    def go(self, core: Core[Stream]) -> None:
        """Let all ranks plan and compute their next step, as the caller does now."""
        if self._has_followers:
            self._ranks.send(Go(self._chosen, self._orders, core.state()))
            self._chosen, self._orders = None, []

    def stop(self) -> None:
        """End the followers; they wait for a message now."""
        self._ranks.send(None)


class Follower:
    """The other ranks' side."""

    def __init__(self, ranks: Ranks, core: Core[int]) -> None:
        self._ranks = ranks
        self._core = core

    def prepare(self) -> bool:
        """Wait for word of rank 0 and get to where it is; False when it stopped."""
        message: Go | None = self._ranks.receive()
        if message is None:
            return False
        core = self._core
        if message.chosen is not None:
            core.finish(message.chosen)
        for order in message.orders:
            carry_out(core, order)
        core.pool.take_changes()  # rank 0 tells of them
        if core.state() != message.state:
            raise RuntimeError(
                f"rank {self._ranks.rank} lost step: it is at {core.state()}, rank 0 at {message.state}"
            )
        return True

    def step(self) -> None:
        """Compute this rank's part of the step that rank 0 computes now."""
        self._core.plan()
        if self._core.has_step:
            self._core.forward()
