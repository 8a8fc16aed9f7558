"""What is asked of a deployment: lengths, how many at a time, how often. Knows no server."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from trtllm_workers.errors import ConfigError

REQUESTS_PER_STREAM = 10
WARMUP_PER_STREAM = 2
# An open loop has no streams to count by: so many seconds of arrivals.
OPEN_LOOP_S = 30.0
_MAX_CONCURRENCY = 16_384


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of ``isl`` prompt tokens and ``osl`` answer tokens, as the server counts them.

    The first ``shared_prefix`` tokens of a prompt's words are the same in all prompts. Without
    ``ignore_eos`` an answer may end earlier than after ``osl`` tokens.
    """

    isl: int
    osl: int
    shared_prefix: int = 0
    ignore_eos: bool = True
    seed: int = 100


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One level of a sweep: ``concurrency`` streams that ask again at once (closed loop), or requests
    that arrive at random ``request_rate`` times a second, whatever the server does (open loop)."""

    num_requests: int
    num_warmup: int
    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def name(self) -> str:
        """Return what its folder is called."""
        if self.concurrency is not None:
            return f"concurrency{self.concurrency}"
        return f"rate{self.request_rate:g}"

    @property
    def in_words(self) -> str:
        """Return what tables call it."""
        return str(self.concurrency) if self.concurrency is not None else f"{self.request_rate:g}/s"


def closed_loops(
    levels: Sequence[int], num_requests: int | None = None, num_warmup: int | None = None
) -> list[Load]:
    """Return a level for each number of streams."""
    return [
        Load(
            concurrency=streams,
            num_requests=num_requests or REQUESTS_PER_STREAM * streams,
            num_warmup=WARMUP_PER_STREAM * streams if num_warmup is None else num_warmup,
        )
        for streams in levels
    ]


def open_loops(
    rates: Sequence[float], num_requests: int | None = None, num_warmup: int | None = None
) -> list[Load]:
    """Return a level for each rate of arrivals."""
    return [
        Load(
            request_rate=rate,
            num_requests=num_requests or max(1, round(OPEN_LOOP_S * rate)),
            num_warmup=max(2, round(2 * rate)) if num_warmup is None else num_warmup,
        )
        for rate in rates
    ]


def arrivals(load: Load, seed: int) -> list[float]:
    """Return when requests of an open loop are meant to start: a Poisson process, in seconds."""
    assert load.request_rate is not None, "a closed loop has no times of arrival"
    dice = random.Random(f"arrivals {seed}")
    now_s, times = 0.0, []
    for _ in range(load.num_requests):
        times.append(now_s)
        now_s += dice.expovariate(load.request_rate)
    return times


def parse_levels(text: str) -> list[int]:
    """Return the numbers of ``--concurrency 1,2,4``. Raises ConfigError for what is none."""
    return [_concurrency(word) for word in _words(text, "concurrency")]


def parse_rates(text: str) -> list[float]:
    """Return the numbers of ``--request-rate 0.5,1``. Raises ConfigError for what is none."""
    rates = []
    for word in _words(text, "request-rate"):
        try:
            rate = float(word)
        except ValueError:
            rate = 0.0
        if not 0 < rate <= 1e6:
            raise ConfigError(
                f"--request-rate: '{word}' is no number of requests per second above 0; "
                "write for example 0.5,1,2",
                param="request_rate",
            )
        rates.append(rate)
    return rates


def _concurrency(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 1 <= int(word) <= _MAX_CONCURRENCY):
        raise ConfigError(
            f"--concurrency: '{word}' is no whole number from 1 to {_MAX_CONCURRENCY}; "
            "write for example 1,2,4",
            param="concurrency",
        )
    return int(word)


def _words(text: str, flag: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"--{flag} is empty; write for example 1,2,4", param=flag)
    if len(set(words)) < len(words):
        raise ConfigError(f"--{flag} {text}: a level is given twice", param=flag)
    return words
