"""TensorRT-LLM's KV events to our changes of the prefix cache. Pure: events in, changes out.

Engine hashes (unsigned 64-bit) are not computed anew, they are looked up: a stored block's tokens and its
parent tell which block of ours it is. Left out are blocks that would say something wrong: partial ones, those
of all but the largest attention window, those whose parent is unknown, first blocks that requests with
different salts or adapters could have made (both change the engine's hash, and neither is in the events), and
first blocks with an image in them, which no other prompt can be known to share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_workers.blocks import block_hash, block_hashes, root_hash
from trtllm_workers.engines.event_log import Change
from trtllm_workers.types import KvEventKind

_UNSIGNED = 1 << 64
# Requests whose first block is remembered, to tell apart what only differs in salt or adapter; and how many
# of those a block may have before they are not told apart any more.
_REMEMBERED = 4096
_MOST_NAMESPACES = 16


@dataclass(slots=True)
class IndexCounts:
    """What was left out or begun anew, since the start."""

    resyncs: int = 0
    partial: int = 0
    orphans: int = 0
    ambiguous: int = 0
    other_windows: int = 0
    unknown: int = 0


class KvIndex:
    """Follows the events of one engine. With attention DP each rank has a cache of its own; a block counts
    as cached while any rank holds it, because requests are not sent to ranks but to workers.
    """

    def __init__(
        self,
        model_id: str,
        block_size: int,
        vocab_size: int = _UNSIGNED,
        placeholder: int | None = None,
    ) -> None:
        self._model_id = model_id
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._placeholder = placeholder
        self._window = 0
        self._ranks: dict[int, dict[int, bytes]] = {}
        self._last_ids: dict[int, int] = {}  # each rank counts its own events
        self._holders: dict[bytes, int] = {}  # our hash → how many ranks hold it
        self._roots: dict[str, bytes] = {}
        self._seen: OrderedDict[tuple[int, ...], set[str]] = OrderedDict()
        self._first_ids: OrderedDict[bytes, int] = OrderedDict()  # first block → its engine hash
        self.counts = IndexCounts()

    def root(self, namespace: str) -> bytes:
        """Return the parent of the first blocks of a namespace."""
        if namespace not in self._roots:
            if len(self._roots) > _REMEMBERED:  # every request may have a salt of its own
                self._roots.clear()
            self._roots[namespace] = root_hash(self._model_id, namespace)
        return self._roots[namespace]

    def note_request(self, prompt: Sequence[int], namespace: str) -> None:
        """Remember whose a first block may be."""
        if len(prompt) < self._block_size:
            return
        first = tuple(prompt[: self._block_size])
        namespaces = self._seen.setdefault(first, set())
        if len(namespaces) <= _MOST_NAMESPACES:
            namespaces.add(namespace)
        self._seen.move_to_end(first)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def cached_blocks(self, prompt: Sequence[int], namespace: str) -> int:
        """Return how many leading full blocks of a prompt are cached; its last token never is."""
        hashes = block_hashes(prompt[:-1], self._block_size, self.root(namespace))
        return next((n for n, one in enumerate(hashes) if one not in self._holders), len(hashes))

    def take(self, event: Mapping[str, Any]) -> list[Change]:
        """Take one event; return what it changed."""
        number = event.get("attention_dp_rank") or 0
        changes = self._continue(number, event.get("event_id"))
        data = event.get("data") or {}
        kind = data.get("type")
        window = event.get("window_size") or 0
        if window > self._window:
            if self._window:  # what was announced so far is of a window that counts no more
                changes += self._clear()
            self._window = window
        elif window < self._window:
            self.counts.other_windows += 1
            return changes
        rank = self._ranks.setdefault(number, {})
        if kind == "stored":
            changes += self._stored(rank, data)
        elif kind == "removed":
            changes += self._removed(rank, data.get("block_hashes") or ())
        elif kind not in ("created", "updated"):  # a block moved to the host can still be used
            self.counts.unknown += 1
        return changes

    def _continue(self, number: int, event_id: Any) -> list[Change]:
        """Compare an event's id with the last one of its rank: a gap means that events were lost."""
        if not isinstance(event_id, int):
            return []
        last = self._last_ids.get(number)
        self._last_ids[number] = event_id
        if last is None or event_id == last + 1:
            return []
        # Lost ones may have been removals, so nothing that was announced may be believed.
        self.counts.resyncs += 1
        return self._clear()

    def _clear(self) -> list[Change]:
        had = bool(self._holders)
        self._ranks.clear()
        self._holders.clear()
        return [Change(KvEventKind.CLEARED)] if had else []

    def _stored(self, rank: dict[int, bytes], data: Mapping[str, Any]) -> Iterator[Change]:
        parent_id = data.get("parent_hash")
        parent: bytes | None = None
        if parent_id is not None:
            parent = rank.get(parent_id % _UNSIGNED)
            if parent is None:
                self.counts.orphans += len(data.get("blocks") or ())
                return
        for block in data.get("blocks") or ():
            tokens = [one["token_id"] for one in block.get("tokens") or ()]
            if len(tokens) != self._block_size:
                self.counts.partial += 1
                return  # only the last of a chain can be partial
            engine_hash = block["block_hash"] % _UNSIGNED
            if parent is None:
                first = self._first_block(tuple(tokens), engine_hash)
                if first is None:
                    self.counts.ambiguous += 1
                    return
                digest = first
            else:
                digest = block_hash(parent, tokens)
            if engine_hash not in rank:
                rank[engine_hash] = digest
                held = self._holders.get(digest, 0)
                self._holders[digest] = held + 1
                if not held:
                    yield Change(KvEventKind.STORED, (digest,), parent)
            parent = digest

    def _first_block(self, tokens: tuple[int, ...], engine_hash: int) -> bytes | None:
        """Return our hash of a first block; None when several namespaces could own it.

        Equal tokens of one namespace always have one engine hash, so a namespace that is known by another
        one is not meant.
        """
        # Embeddings stand there as ids that no text has.
        if self._placeholder in tokens or max(tokens) >= self._vocab_size:
            return None
        namespaces = self._seen.get(tokens) or {""}
        if len(namespaces) > _MOST_NAMESPACES:
            return None
        possible = []
        for namespace in namespaces:
            digest = block_hash(self.root(namespace), tokens)
            known = self._first_ids.get(digest)
            if known == engine_hash:
                return digest
            if known is None:
                possible.append(digest)
        if len(possible) != 1:
            return None
        self._first_ids[possible[0]] = engine_hash
        if len(self._first_ids) > _REMEMBERED:
            self._first_ids.popitem(last=False)
        return possible[0]

    def _removed(self, rank: dict[int, bytes], hashes: Sequence[int]) -> Iterator[Change]:
        for engine_hash in hashes:
            digest = rank.pop(engine_hash % _UNSIGNED, None)
            if digest is None:
                continue  # it was left out when it was stored
            self._holders[digest] -= 1
            if not self._holders[digest]:
                del self._holders[digest]
                yield Change(KvEventKind.REMOVED, (digest,))
