"""Where the time of a request went in each of two deployments, in sentences made of measurements. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trtllm_workers.bench.results import Level
from trtllm_workers.bench.stats import Change
from trtllm_workers.bench.tables import ms
from trtllm_workers.bench.workload import Workload

_LARGE_SHARE = 0.25


def reasons(
    aggregated: Sequence[Level],
    aggregated_alone: Level | None,
    split: Sequence[Level],
    split_alone: Level | None,
    name: str,
    changes: Mapping[str, Change],
) -> list[str]:
    """Return where the time went; what is more than a figure is only said of changes above noise."""
    ours_ttft, theirs_ttft = _mean(aggregated, _ttft), _mean(split, _ttft)
    ours_itl, theirs_itl = _mean(aggregated, _itl), _mean(split, _itl)
    told = [
        f"first token: {ms(ours_ttft)} ms aggregated{_waited(ours_ttft, aggregated_alone)}; "
        f"{ms(theirs_ttft)} ms {name}{_waited(theirs_ttft, split_alone)}",
    ]
    if phases := _phases(split):
        total = sum(phases.values())
        parts = ", ".join(f"{phase.replace('_', ' ')} {ms(mean)}" for phase, mean in phases.items())
        told.append(f"its first token on the workers, ms on average: {parts}")
        if phases.get("queue", 0.0) > _LARGE_SHARE * total:
            told.append(
                f"{phases['queue'] / total:.0%} of that is waiting for a prefill worker: prefill is its "
                "bottleneck; more prefill workers, or fewer tokens to prefill, would help"
            )
        if phases.get("transfer", 0.0) > _LARGE_SHARE * total:
            told.append(
                f"{phases['transfer'] / total:.0%} of that is moving KV: look at the transport and wire "
                "in 'trtllm-launch ps'"
            )
    ours_stalled, theirs_stalled = _mean(aggregated, _stalled), _mean(split, _stalled)
    told.append(
        f"between tokens: {ms(ours_itl, 2)} ms aggregated{_beside(ours_itl, aggregated_alone)}, "
        f"{ours_stalled:.0%} of it stalls (gaps beyond twice the median); "
        f"{ms(theirs_itl, 2)} ms {name}{_beside(theirs_itl, split_alone)}, {theirs_stalled:.0%} stalls"
    )
    itl = changes.get("ITL p50")
    if itl is None or not itl.certain:
        return told
    if itl.share < 0 and ours_stalled > theirs_stalled:
        told.append(
            "prefills of other requests interrupt decoding on aggregated workers, not there"
        )
    elif itl.share < 0:
        told.append("steps of aggregated workers carry prefill for others, which makes each longer")
    else:
        told.append(
            "fewer workers decode there, so each holds more streams: decode is its bottleneck"
        )
    return told


def break_even(
    workload: Workload,
    aggregated: Sequence[Level],
    split: Sequence[Level],
    changes: Mapping[str, Change],
) -> str:
    """Return the answer length from which the other one would be sooner done.

    "" where there is none, and where one of the two times differs by no more than noise.
    """
    told = [changes.get("TTFT p50"), changes.get("ITL p50")]
    if not all(change is not None and change.certain for change in told):
        return ""
    first = _mean(split, _ttft) - _mean(aggregated, _ttft)
    each = _mean(aggregated, _itl) - _mean(split, _itl)
    if first == 0 or each == 0 or (first > 0) != (each > 0):
        return ""
    tokens = 1 + first / each
    longer, shorter = (
        ("disaggregated", "aggregated") if first > 0 else ("aggregated", "disaggregated")
    )
    return (
        f"break-even: with these times per token answers of more than about {tokens:,.0f} tokens end "
        f"sooner {longer}, shorter ones {shorter}; they had {workload.osl}. Another length changes the "
        "load as well, so measure it"
    )


def _phases(levels: Sequence[Level]) -> dict[str, float]:
    names = [name for name in levels[0].phases_s if name != "ingress"]
    return {
        name: sum(level.phases_s.get(name, 0.0) for level in levels) / len(levels) for name in names
    }


def _waited(ttft_s: float, alone: Level | None) -> str:
    if alone is None or alone.ttft_s.p50 is None:
        return ""
    return (
        f" ({ms(alone.ttft_s.p50)} alone, {ms(max(0.0, ttft_s - alone.ttft_s.p50))} behind others)"
    )


def _beside(itl_s: float, alone: Level | None) -> str:
    if alone is None or alone.itl_s.p50 is None:
        return ""
    return f" ({ms(alone.itl_s.p50, 2)} alone)"


def _mean(levels: Sequence[Level], read: Callable[[Level], float]) -> float:
    return sum(map(read, levels)) / len(levels)


def _ttft(level: Level) -> float:
    return level.ttft_s.mean or 0.0


def _itl(level: Level) -> float:
    return level.itl_s.mean or 0.0


def _stalled(level: Level) -> float:
    return level.stalled_share
