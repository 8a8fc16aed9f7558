"""The story of a verdict: each way to use the workers is started, measured in turn with the others, ended.

Deployments of our own come one after the other, in the order A B C C B A: what slows the machine steadily
meets all alike. Deployments that run already take turns within each pair of rounds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_workers.bench.client import Client
from trtllm_workers.bench.clients import Own
from trtllm_workers.bench.connection import Target
from trtllm_workers.bench.deployment import Mode, Real, ask_deployment
from trtllm_workers.bench.prompts import Prompts, make_prompts
from trtllm_workers.bench.results import write_records
from trtllm_workers.bench.started import Split, started
from trtllm_workers.bench.sweep import Say, level_notes, measure_level, require_room
from trtllm_workers.bench.tables import ms
from trtllm_workers.bench.verdict import Candidate, Objective, Verdict, judge
from trtllm_workers.bench.workload import Load, Workload
from trtllm_workers.errors import ConfigError

_ALONE = Load(concurrency=1, num_requests=6, num_warmup=2)
_NUM_TEXTS = 4
_TEXT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Trial:
    """What to measure. ``rounds`` is per visit of a deployment; each is visited twice."""

    workload: Workload
    loads: Sequence[Load]
    objective: Objective | None
    model: str | None
    rounds: int
    timeout_s: float
    tokenizer: Path | None
    folder: Path


@dataclass(slots=True)
class _Way:
    """One way to use the workers, while it is being measured."""

    candidate: Candidate
    mode: Mode
    num_rounds: int = 0
    notes: list[str] = field(default_factory=list)


async def try_urls(
    trial: Trial, agg_url: str, disagg_url: str, say: Say
) -> tuple[Verdict, list[str]]:
    """Judge two deployments that run already; return the verdict and notes."""
    async with AsyncExitStack() as stack:
        measured: list[tuple[_Way, _Bench]] = []
        prompts: Prompts | None = None
        for name, mode, url in (
            ("aggregated", "aggregated", agg_url),
            ("disaggregated", "disaggregated", disagg_url),
        ):
            way = _Way(
                Candidate(name=name), "aggregated" if mode == "aggregated" else "disaggregated"
            )
            bench = await stack.enter_async_context(_bench(trial, way, url, prompts, say))
            prompts = bench.prompts
            measured.append((way, bench))
        for _, bench in measured:
            await bench.first()
        for number in range(2 * trial.rounds):
            for _, bench in measured if number % 2 == 0 else reversed(measured):
                await bench.round()
        ways = [way for way, _ in measured]
    return _judged(trial, ways)


async def try_splits(
    trial: Trial,
    splits: Sequence[Split],
    up: Callable[[Split], Sequence[str]],
    environ: Mapping[str, str],
    say: Say,
) -> tuple[Verdict, list[str]]:
    """Start, measure and end each split; the first is the aggregated one. Return verdict and notes."""
    ways = [
        _Way(Candidate(name=split.name), "aggregated" if split.aggregated else "disaggregated")
        for split in splits
    ]
    prompts: Prompts | None = None
    there = list(zip(splits, ways, strict=True))
    turns = [(there[0], 1), *((one, 1) for one in there[1:-1]), (there[-1], 2)]
    turns += [(one, 1) for one in reversed(there[:-1])]
    for (split, way), visits in turns:
        say(f"starting {split.name}")
        async with (
            started(up(split), environ) as url,
            _bench(trial, way, url, prompts, say) as bench,
        ):
            prompts = bench.prompts
            if way.candidate.alone is None:
                await bench.first()
            for _ in range(visits * trial.rounds):
                await bench.round()
    return _judged(trial, ways)


class _Bench:
    """One deployment that is up, ready to be measured."""

    def __init__(
        self, trial: Trial, way: _Way, client: Client, real: Real, prompts: Prompts, say: Say
    ) -> None:
        self.prompts = prompts
        self._trial = trial
        self._way = way
        self._client = client
        self._real = real
        self._say = say
        self._asker = Own(client, prompts, trial.workload)

    async def first(self) -> None:
        """Measure one request at a time, and keep what it answers to prompts that all get."""
        trial, candidate = self._trial, self._way.candidate
        tokens = min(_TEXT_TOKENS, trial.workload.osl)
        ending = {"min_tokens": tokens} if "min_tokens" in self.prompts.ending() else {}
        bodies = self.prompts.bodies(
            "texts", _NUM_TEXTS, temperature=0, max_tokens=tokens, **ending
        )
        # One by one: what else is in a batch must not matter, and here cannot.
        candidate.texts = [one.text or one.problem for one in await self._client.texts(bodies)]
        candidate.alone, _ = await measure_level(
            self._client, self._asker, _ALONE, trial.folder, trial.workload.seed, self._real
        )

    async def round(self) -> None:
        """Measure every level once."""
        trial, way = self._trial, self._way
        way.num_rounds += 1
        folder = trial.folder / way.candidate.name.replace(" ", "_") / f"round{way.num_rounds}"
        for load in trial.loads:
            into = folder / load.name
            into.mkdir(parents=True)
            # The same prompts for all ways in a round, other ones in every round.
            seed = trial.workload.seed + way.num_rounds
            level, records = await measure_level(
                self._client, self._asker, load, into, seed, self._real
            )
            write_records(into / "requests.jsonl", records)
            way.candidate.rounds.setdefault(load.name, []).append(level)
            self._say(
                f"  {way.candidate.name}, round {way.num_rounds}, {load.in_words} streams: "
                f"{level.tokens_per_s:,.1f} tokens/s, TTFT p50 {ms(level.ttft_s.p50)} ms, "
                f"ITL p50 {ms(level.itl_s.p50, 2)} ms, {level.num_failed} failed"
            )
            for note in level_notes(level, trial.workload):
                way.notes.append(
                    f"{way.candidate.name}, round {way.num_rounds}, {load.name}: {note}"
                )


@asynccontextmanager
async def _bench(
    trial: Trial, way: _Way, url: str, prompts: Prompts | None, say: Say
) -> AsyncIterator[_Bench]:
    """Connect to a deployment. Raises ConfigError when it is not what it is taken for."""
    async with Client(Target(url), timeout_s=trial.timeout_s) as client:
        real = await ask_deployment(client, trial.model)
        if real.mode is not None and real.mode != way.mode:
            raise ConfigError(f"{url} was given as {way.mode}, and the server is {real.mode}")
        require_room(trial.workload, real)
        say(f"{client.target.url}: {real.in_words}")
        if prompts is None or prompts.model != real.model:
            prompts, notes = await make_prompts(client, real.model, trial.workload, trial.tokenizer)
            way.notes += notes
        yield _Bench(trial, way, client, real, prompts, say)


def _judged(trial: Trial, ways: Sequence[_Way]) -> tuple[Verdict, list[str]]:
    candidates = [way.candidate for way in ways]
    verdict = judge(trial.workload, trial.objective, candidates[0], candidates[1:])
    return verdict, [note for way in ways for note in way.notes]
