"""The vocabulary every floor shares: requests, chunks, roles, records. No behaviour, no I/O.

Values are immutable. ``msgspec.Struct`` rather than a dataclass where a value is made once per
token or crosses the wire: it is built in C and encodes itself.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Role(StrEnum):
    """What a worker does. An ingress is registered too, so that a deployment can be found as a whole."""

    AGGREGATED = "aggregated"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
    INGRESS = "ingress"


class Strategy(StrEnum):
    """Who gets a disaggregated request first."""

    DECODE_FIRST = "decode_first"
    PREFILL_FIRST = "prefill_first"


class FinishReason(StrEnum):
    """Why a stream ended. ``stop`` is an eos or stop token id (or, in the ingress, a stop string)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GuidedKind(StrEnum):
    """What the text of an answer must match."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"


class GuidedDecoding(msgspec.Struct, frozen=True, array_like=True):
    """Restricts an answer's text. ``value``: a JSON schema as JSON text, a regular expression, or an
    EBNF grammar; empty for ``JSON_OBJECT``.
    """

    kind: GuidedKind
    value: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Zero is a value, never "unset".

    * ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 are off.
    * ``seed`` None: the engine draws one; equal seeds give equal tokens on equal prompts,
      whatever else runs.
    * ``repetition_penalty`` (1 = off) counts prompt and output; ``presence_penalty`` and
      ``frequency_penalty`` (0 = off) count output only.
    * ``logprobs`` None = off, 0 = the chosen token only, k = the k best beside it; natural log of
      the model's distribution before temperature, penalties and bias.
    * ``min_tokens``: eos and stop ids cannot be sampled before that many tokens.
    * ``logit_bias``: (token id, bias) pairs added to the logits.
    * ``guided``: what the text must match.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    guided: GuidedDecoding | None = None


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a process listens, and which incarnation of it is meant."""

    host: str
    port: int
    peer_id: str
    incarnation: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.peer_id}@{host}:{self.port}"


class MediaKind(StrEnum):
    """What bytes of a medium are."""

    EMBEDDINGS = "embeddings"
    IMAGE = "image"


class MediaItem(msgspec.Struct, frozen=True, array_like=True):
    """One image of a prompt, in the form the model takes it: what stands for its placeholder tokens.

    ``digest``: 16 bytes over the content and over what made it (model, vision tower, kind): equal digests
    mean equal KV. The placeholder tokens are ``num_tokens`` from ``offset`` on. ``grid`` is (time, height,
    width) in merged patches for models whose positions are in space; None for the others.

    ``holder`` has the bytes, ``num_bytes`` of ``kind``: rows [num_tokens, hidden] of embeddings in the
    model's dtype, or the RGB bytes [height, width, 3] of an image of ``size`` (height, width). ``native``
    is an engine's own handle instead of bytes; it is good on the host of ``holder`` only.
    """

    digest: bytes
    offset: int
    num_tokens: int
    grid: tuple[int, int, int] | None = None
    holder: Address | None = None
    kind: MediaKind = MediaKind.EMBEDDINGS
    num_bytes: int = 0
    size: tuple[int, int] = (0, 0)
    native: bytes = b""


class MediaReference(msgspec.Struct, frozen=True, array_like=True):
    """One image as a request names it: an http(s) or ``data:`` URL, ``file://`` URL or path.

    ``param`` is where in the request it stands, for errors.
    """

    url: str
    param: str


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt and one answer; ``n`` answers are n requests. Nobody mutates it.

    ``cache_salt`` separates prefix caches: requests with different salts never share blocks. ``lora``
    names one of the worker's adapters (``EngineInfo.loras``); "" is the model itself. ``media`` are its
    images in order; ``prompt_token_ids`` holds the placeholder tokens of all of them. With ``media``,
    ``prompt_text`` is the prompt's text with one placeholder an image, for engines that tokenize themselves.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    lora: str = ""
    media: tuple[MediaItem, ...] = ()
    prompt_text: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of the chosen token, and of the best ones beside it."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class TokenChunk(msgspec.Struct, frozen=True, gc=False):
    """What one engine step adds to one stream.

    The last chunk, and only it, has ``finish_reason``. ``token_ids`` holds every token of the
    answer that the caller should see: a final eos or stop id is not among them, but counts in
    ``num_hidden_tokens`` (0 or 1) so that usage is right. ``logprobs`` runs parallel to
    ``token_ids`` when asked for. ``cached_tokens`` is the same in every chunk of a stream: prompt
    tokens taken from the prefix cache. ``error_code``, ``error_message`` and perhaps ``error_param``
    (the request field at fault) come with ``FinishReason.ERROR``; ``stop_token_id`` with a ``STOP`` by id.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    num_hidden_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    stop_token_id: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None


class Prefilled(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefill made: the first token, and where the prompt's KV lies until it is released.

    With a ``finish_reason`` in ``first`` the request ended here and nothing is held. Otherwise
    ``block_ids`` of the engine's pool, in order, hold the KV of all ``num_tokens`` prompt tokens; the
    last block may be partly filled. ``queue_s`` and ``compute_s`` are seconds until the first prompt
    token was computed, and from then until the first token was there. An engine that moves its own KV
    has no ``block_ids`` but ``opaque``, the state that decode needs, and ``hold_s``: after so long it
    gives the KV up by itself (0: it waits for ``release``).
    """

    first: TokenChunk
    block_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    opaque: bytes = b""
    hold_s: float = 0.0


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that an engine holds for a prompt whose KV comes from elsewhere.

    ``block_ids`` has one block per ``block_size`` prompt tokens, in order, the last perhaps to be
    filled partly; the first ``num_cached_blocks`` hold their KV already (the engine's own prefix
    cache) and must not be written. With ``ended`` (abort, error) nothing is held. An engine that moves
    its own KV names no blocks; ``num_cached_blocks`` is then what it believes to have cached.
    """

    block_ids: tuple[int, ...] = ()
    num_cached_blocks: int = 0
    ended: TokenChunk | None = None


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How one block lies in memory: equal layouts can exchange blocks byte for byte.

    A block is ``num_layers × 2 (K, V) × block_size × num_kv_heads × head_dim`` values of
    ``dtype``, in the axis order named by ``order``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    order: str
    block_bytes: int


class TransportCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer needs to reach a worker's KV pool. Secret: travels only on the request plane.

    ``address`` is the transport's own: worker address, agent metadata, host, port, token.
    """

    transport: str
    peer_id: str
    layout: KvLayout
    num_blocks: int
    address: bytes

    def __repr__(self) -> str:
        return f"TransportCard({self.transport}, {self.peer_id}, {self.num_blocks} blocks)"


class VisionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine knows of images. An engine without it takes text only.

    ``family``: llava, qwen2_vl, … ``image_token_id`` stands for a row of embeddings in a prompt, and may not
    come in one otherwise; ``placeholder`` is its text. Rows have ``hidden_size`` values of ``dtype``.
    ``encodes``: it makes items of references (``EncodeAsk``); an engine that does not still takes items
    that others made. ``embeddings``: whether files of precomputed embeddings are taken too, and ``images``
    whether images are. ``uses_grid``: positions in space, so embeddings come with their grid.
    """

    family: str
    image_token_id: int
    placeholder: str
    hidden_size: int
    dtype: str
    encodes: bool = True
    images: bool = True
    embeddings: bool = True
    uses_grid: bool = False


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is, known once it has started.

    ``capabilities`` names the sampling fields it honours; the ingress refuses the others by name.
    ``max_seq_len`` bounds prompt + output tokens of one request, ``max_prompt_len`` its prompt alone
    (0: only ``max_seq_len`` does). ``loras`` names the adapters it holds. ``kv_wire`` is the transport
    that an engine with KV of its own was *seen* to use; "" until it was seen. ``kv_events``: it tells
    changes of its prefix cache. ``tensor_parallel_size``: ranks that share the model; 0: it does not tell.
    ``vision``: what it knows of images; None: it takes text only.
    """

    engine: str
    model_path: str
    model_id: str
    block_size: int
    num_blocks: int
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()
    layout: KvLayout | None = None
    kv_transport: str = "none"
    kv_wire: str = ""
    max_prompt_len: int = 0
    loras: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = ""
    kv_events: bool = False
    tensor_parallel_size: int = 0
    vision: VisionInfo | None = None


# What a process without an engine registers with.
NO_ENGINE = EngineInfo(
    engine="none",
    model_path="",
    model_id="",
    block_size=1,
    num_blocks=0,
    max_seq_len=0,
    max_batch_size=0,
    max_num_tokens=0,
    vocab_size=0,
)


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Load and counters of an engine now. Block counts add up: free + cached + active = total.

    ``active`` blocks belong to requests, ``cached`` ones are reusable and may be evicted. Of the
    active ones ``pinned`` wait to be fetched by a decode worker and ``reserved`` wait for KV of a
    prefill worker. Counters only grow; ``allocated_blocks`` - ``freed_blocks`` counts what requests
    hold (a block shared by two requests counts twice), so it is 0 when no request is left.
    """

    num_running: int = 0
    num_waiting: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    active_blocks: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    aborts: int = 0
    finished: int = 0
    pinned_blocks: int = 0
    reserved_blocks: int = 0
    allocated_blocks: int = 0
    freed_blocks: int = 0


class KvEventKind(StrEnum):
    """What happened to cached blocks."""

    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


class KvEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A change of one worker's prefix cache.

    ``seq`` grows by one per event of an engine's life, from 1. A subscription begins with a
    snapshot: ``CLEARED`` and ``STORED`` events that all carry the sequence number the snapshot
    was taken at. ``block_hashes`` of one ``STORED`` event chain: the first hangs on ``parent_hash`` (None =
    a prompt's beginning). Blocks of 16-byte hashes as in ``blocks.py``.
    """

    seq: int
    kind: KvEventKind
    block_hashes: tuple[bytes, ...] = ()
    parent_hash: bytes | None = None


class WorkerState(StrEnum):
    """Where a worker is in its life."""

    READY = "ready"
    DRAINING = "draining"


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What discovery tells about one worker. ``model`` is the served name.

    ``max_local_prefill_length``: a decode worker computes prompts of at most so many uncached tokens
    itself; no prefill worker need be asked for them. ``queues_prefill``: it lets prompts be computed by
    whoever takes them from the prefill queue. ``no_kv_events``: why its engine's events cannot be
    relied on; "" when an event was seen.
    """

    worker_id: str
    model: str
    role: Role
    address: Address
    engine: EngineInfo
    state: WorkerState = WorkerState.READY
    started_at_s: float = 0.0
    max_local_prefill_length: int = 0
    queues_prefill: bool = False
    no_kv_events: str = ""
