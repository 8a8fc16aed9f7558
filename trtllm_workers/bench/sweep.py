"""The story of a sweep: ask the server what it is, make prompts, measure level after level, write it down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trtllm_workers.bench.client import Client
from trtllm_workers.bench.clients import Aiperf, Asker, ClientName, Own, find_aiperf
from trtllm_workers.bench.connection import Target
from trtllm_workers.bench.deployment import (
    Real,
    Stated,
    ask_deployment,
    contradictions,
    phase_means,
    read_phases,
)
from trtllm_workers.bench.picture import sweep_picture
from trtllm_workers.bench.prompts import make_prompts
from trtllm_workers.bench.records import Record
from trtllm_workers.bench.results import (
    Level,
    Results,
    level_of,
    new_results,
    write_records,
    write_results,
)
from trtllm_workers.bench.tables import level_row, sweep_header
from trtllm_workers.bench.workload import Load, Workload
from trtllm_workers.errors import ConfigError

BUSY_CPU_SHARE = 0.8
_CACHED_SHARE = 0.05
_MAX_FOLDERS = 100_000

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to measure, and where to leave it. ``path`` is where programs are looked for."""

    url: str
    model: str | None
    workload: Workload
    loads: Sequence[Load]
    stated: Stated
    kind: str
    client: ClientName
    timeout_s: float
    tokenizer: Path | None
    root: Path
    path: str | None


async def run_sweep(sweep: Sweep, say: Say) -> tuple[Results, Path]:
    """Measure every level; return what was measured and the folder it lies in.

    ``results.json`` is written after each level, so that an interrupted sweep keeps what it has. Raises
    ConfigError when the deployment is not what was stated, before anything is measured.
    """
    async with Client(Target(sweep.url), timeout_s=sweep.timeout_s) as client:
        program = find_aiperf(sweep.client, sweep.path)
        real = await ask_deployment(client, sweep.model)
        require_as_stated(sweep.stated, real, client.target.url)
        require_room(sweep.workload, real)
        say(f"{client.target.url}: {real.in_words}")
        prompts, notes = await make_prompts(client, real.model, sweep.workload, sweep.tokenizer)
        asker: Asker = Own(client, prompts, sweep.workload)
        if program is not None:
            asker = Aiperf(
                program,
                prompts,
                sweep.workload,
                url=client.target.url,
                model=real.model,
                tokenizer=sweep.tokenizer,
                timeout_s=sweep.timeout_s,
            )
        results = new_results(
            client=asker.name,
            url=client.target.url,
            kind=sweep.kind,
            workload=sweep.workload,
            stated=sweep.stated,
            real=real,
        )
        results.notes += notes
        if real.mode is None and sweep.stated != Stated():
            results.notes.append(
                "the server does not tell how it is built: what was stated is unchecked"
            )
        folder = new_folder(sweep.root)
        (folder / "deployment_config.json").write_bytes(_deployment_config(results))
        for note in results.notes:
            say(f"note: {note}")
        say(f"client {asker.name}, ISL {sweep.workload.isl}, OSL {sweep.workload.osl}, to {folder}")
        say(sweep_header())
        for load in sweep.loads:
            into = folder / load.name
            into.mkdir()
            level, records = await measure_level(
                client, asker, load, into, sweep.workload.seed, real
            )
            write_records(into / "requests.jsonl", records)
            results.client = asker.name
            results.levels.append(level)
            say(level_row(level))
            for note in level_notes(level, sweep.workload):
                results.notes.append(f"{load.name}: {note}")
                say(f"note: {results.notes[-1]}")
            write_results(folder / "results.json", results)
            (folder / "results.svg").write_text(sweep_picture(results), encoding="utf-8")
        return results, folder


async def measure_level(
    client: Client, asker: Asker, load: Load, folder: Path, seed: int, real: Real
) -> tuple[Level, list[Record]]:
    """Return what a level measured, with the server's own times of its first tokens."""
    await asker.warm_up(load, seed)
    settled = real.mode == "disaggregated"
    before = await read_phases(client, settled=settled)
    records, cpu_s = await asker.measure(load, folder, seed)
    after = await read_phases(client, settled=settled)
    return level_of(load, records, cpu_s=cpu_s, phases_s=phase_means(before, after)), records


def require_as_stated(stated: Stated, real: Real, url: str) -> None:
    """Raise ConfigError with every difference between what the user says and what the server is."""
    if found := contradictions(stated, real):
        raise ConfigError(
            "\n".join(
                [
                    f"{url} is not what was stated; correct the options, or measure the other one",
                    *found,
                ]
            ),
            param="mode",
        )


def require_room(workload: Workload, real: Real) -> None:
    """Raise ConfigError when the model cannot take prompt and answer together."""
    whole = workload.isl + workload.osl
    if real.max_model_len and whole > real.max_model_len:
        raise ConfigError(
            f"ISL {workload.isl} and OSL {workload.osl} are {whole} tokens, and {real.model} takes "
            f"{real.max_model_len} together; lower --isl or --osl",
            param="isl",
        )


def level_notes(level: Level, workload: Workload) -> list[str]:
    """Return what a reader of a level's figures must know. Pure."""
    notes = []
    for problem, count in level.failures.items():
        notes.append(f"{count} of {level.num_good + level.num_failed} requests: {problem}")
    if not level.valid:
        notes.append("INVALID: more than 1 % of the requests went wrong")
    if level.cpu_share is not None and level.cpu_share > BUSY_CPU_SHARE:
        notes.append(
            f"the client used {level.cpu_share:.0%} of a core: times may be its own and not the server's"
        )
    expected = workload.shared_prefix / workload.isl
    if level.cached_share > expected + _CACHED_SHARE:
        notes.append(
            f"{level.cached_share:.0%} of the prompt tokens came from the prefix cache, where "
            f"{expected:.0%} are shared: an earlier run with the same --seed?"
        )
    return notes


def new_folder(root: Path) -> Path:
    """Make and return ``artifacts_<n>`` with the first free number, for this run alone."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in range(_MAX_FOLDERS):
            with suppress(FileExistsError):
                folder = root / f"artifacts_{number}"
                folder.mkdir()
                return folder
    except OSError as wrong:
        raise ConfigError(
            f"cannot make a folder in {root}: {wrong.strerror or wrong}; "
            "choose another with --artifacts-root-dir",
            param="artifacts_root_dir",
        ) from wrong
    raise ConfigError(f"{root} holds {_MAX_FOLDERS} runs; clear it up", param="artifacts_root_dir")


def _deployment_config(results: Results) -> bytes:
    """Return the file that scripts around perf.sh read beside each sweep."""
    stated, real, workload = results.stated, results.deployment, results.workload

    def number(said: int | None, told: dict[str, int], role: str) -> int | None:
        return said if said is not None else told.get(role)

    told = {
        "kind": results.deployment_kind,
        "model": real.model,
        "input_sequence_length": workload.isl,
        "output_sequence_length": workload.osl,
        "mode": stated.mode or real.mode,
        "tensor_parallelism": number(stated.tp, real.tensor_parallel_size, "aggregated"),
        "data_parallelism": number(stated.dp, real.num_workers, "aggregated"),
        "prefill_tensor_parallelism": number(
            stated.prefill_tp, real.tensor_parallel_size, "prefill"
        ),
        "prefill_data_parallelism": number(stated.prefill_dp, real.num_workers, "prefill"),
        "decode_tensor_parallelism": number(stated.decode_tp, real.tensor_parallel_size, "decode"),
        "decode_data_parallelism": number(stated.decode_dp, real.num_workers, "decode"),
    }
    return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"
