"""Tokens without a model: each is a function of all tokens before it. Knows no request, no pool.

Like a greedy model's, the continuation of a prefix is the same whoever goes on from it: the same
request alone or in a crowd, after a preemption, or a second request whose prompt is the first one's
prompt and the tokens it had made. A keyed hash covers whole segments of the sequence (C speed); a
small linear generator, stirred by every token, covers the segment that is not full yet.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

SEGMENT_TOKENS = 64
_TABLE_BITS = 16
_MASK = (1 << 64) - 1
_MULTIPLIER = 6364136223846793005  # Knuth's, for a linear generator modulo 2^64
_STEP = 1442695040888963407


class Vocabulary:
    """The ids the simulator speaks, spread evenly over a table that 16 random bits index."""

    def __init__(self, model_id: str, word_ids: Sequence[int], eos_token_id: int | None) -> None:
        self.key = blake2b(model_id.encode(), digest_size=32).digest()
        self.word_ids = word_ids
        self.eos_token_id = eos_token_id
        self.table = [word_ids[(i * len(word_ids)) >> _TABLE_BITS] for i in range(1 << _TABLE_BITS)]


class Continuation:
    """Continues one sequence, a segment at a time.

    ``seed`` None is greedy; else another sequence per seed. ``stop_ids`` end the sequence but are
    never made before index ``stop_from``; ``eos_probability`` is the chance of eos from there on.
    ``images`` are what the prompt shows besides tokens. ``wrong_kv`` is what was found in place of the
    prompt's KV; it leads the sequence astray.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokens: Sequence[int],
        *,
        seed: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        stop_from: int = 0,
        eos_probability: float = 0.0,
        images: bytes = b"",
        wrong_kv: bytes = b"",
    ) -> None:
        self._vocabulary = vocabulary
        self._stop_ids = stop_ids
        self._stop_from = stop_from
        self._eos_below = 0
        if vocabulary.eos_token_id is not None:
            self._eos_below = round(eos_probability * (1 << 32))
        self._spare = next((i for i in vocabulary.word_ids if i not in stop_ids), None)
        self._hash = blake2b(digest_size=8, key=vocabulary.key)
        if seed is not None:
            self._hash.update(b"seed %d " % seed)
        if images:
            self._hash.update(b"images " + images)
        if wrong_kv:
            self._hash.update(b"wrong KV " + wrong_kv)
        whole = len(tokens) - len(tokens) % SEGMENT_TOKENS
        self._state = self._absorb(tokens[:whole])
        for token in tokens[whole:]:
            self._state = (self._state * _MULTIPLIER + token + _STEP) & _MASK

    def extend(self, tokens: list[int], limit: int) -> int | None:
        """Append tokens up to the next segment's border or ``limit`` in all.

        Returns the index of the eos or stop id if one was made (it is the last token then).
        """
        border = len(tokens) + SEGMENT_TOKENS - len(tokens) % SEGMENT_TOKENS
        until = min(border, limit)
        if self._stop_ids or self._eos_below:
            stop = self._extend_to_stop(tokens, until)
            if stop is not None:
                return stop
        else:
            state, table = self._state, self._vocabulary.table
            for _ in range(until - len(tokens)):
                token = table[state >> 48]
                tokens.append(token)
                state = (state * _MULTIPLIER + token + _STEP) & _MASK
            self._state = state
        if len(tokens) == border:
            self._state = self._absorb(tokens[border - SEGMENT_TOKENS :])
        return None

    def _extend_to_stop(self, tokens: list[int], until: int) -> int | None:
        state, table = self._state, self._vocabulary.table
        for index in range(len(tokens), until):
            token = table[state >> 48]
            stop = False
            # The low half of the state is weak, the middle is not: these bits decide about eos.
            if (state >> 16) & 0xFFFFFFFF < self._eos_below and index >= self._stop_from:
                stop, token = True, self._vocabulary.eos_token_id or 0
            elif token in self._stop_ids:
                if index >= self._stop_from:
                    stop = True
                elif self._spare is not None:
                    token = self._spare
            tokens.append(token)
            if stop:
                return index
            state = (state * _MULTIPLIER + token + _STEP) & _MASK
        self._state = state
        return None

    def _absorb(self, segments: Sequence[int]) -> int:
        self._hash.update(array("I", segments).tobytes())
        return int.from_bytes(self._hash.digest(), "little")
