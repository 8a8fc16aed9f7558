"""Two ranks over real MPI: the same bits, whole blocks, nothing left, and ends that end all."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny_models import make_tiny_checkpoint
from tests.unit.torch_engine.driver import Driver, prompt_of
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.torch import ranks as ranks_module
from trtllm_workers.engines.torch.loading import load
from trtllm_workers.engines.torch.ranks import Ranks
from trtllm_workers.engines.torch.settings import KEYS
from trtllm_workers.types import TokenChunk

pytest.importorskip("mpi4py")
MPIEXEC = Path(sys.executable).parent / "mpiexec"
pytestmark = [
    pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python"),
    pytest.mark.timeout(120),  # starting two processes with torch on a busy machine
]

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "max_batch_size": 16,
    "kv_cache_config__tokens_per_block": 16,
    "kv_cache_config__max_tokens": 2048,
}
GREEDY = {"max_tokens": 16, "logprobs": 0}
SEEDED = {"max_tokens": 16, "logprobs": 0, "temperature": 0.9, "top_p": 0.9, "seed": 5}
SUBJECTS: list[dict[str, Any]] = [
    {"seed": index, "length": length, "sampling": sampling}
    for index, length in enumerate((1, 17, 60, 97))
    for sampling in (GREEDY, SEEDED)
]
INVARIANT = ("llama", "llama_bfloat16", "wide_bfloat16")
MODELS = (*INVARIANT, "llama_llama3_rope", "qwen2_window", "qwen3", "mistral_window")
HANDOFF: dict[str, Any] = {"seed": 3, "length": 75, "sampling": {"max_tokens": 20}}
NOT_DIVISIBLE = "llama_linear_rope"  # one KV head

Make = Callable[..., Driver]


def world(folder: Path, jobs: list[dict[str, Any]], num_ranks: int = 2) -> subprocess.Popen[str]:
    """Start a world; its files go to ``folder``."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = ["-m", "mpi4py", "-m", "tests.unit.torch_engine.ranks_program"]
    files = [str(folder / "jobs.json"), str(folder / "results.json")]
    return subprocess.Popen(
        [str(MPIEXEC), "-n", str(num_ranks), sys.executable, *program, *files],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_of(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    """Wait for a world's end; return exit code and output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpiexec ends its ranks
        output, _ = process.communicate(timeout=10)
        pytest.fail(f"the world did not end:\n{output}")
    return process.returncode, output


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"results.json.pid{rank}").read_text())


def ends(folder: Path, rank: int) -> bool:
    """Wait for the end of a rank, which mpiexec may precede by a moment."""
    try:
        process = os.pidfd_open(pid_of(folder, rank))
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 5)[0])
    finally:
        os.close(process)


@pytest.fixture(scope="module")
def single(model_folder: Callable[[str], Path]) -> Make:
    """A core of one rank."""

    def make(name: str, **settings: Any) -> Driver:
        chosen = {**SETTINGS, "tensor_parallel_size": 1, **settings}
        config = default_config("torch", KEYS, **chosen)
        loaded = load(model_folder(name), config, lambda _share: None, 1)
        return Driver(loaded, reuse=True, chunked=True)

    return make


@pytest.fixture(scope="module")
def prefilled_here(single: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The blocks and the first token of the handoff's prompt, computed by one rank."""
    source = single("llama")
    prompt = prompt_of(HANDOFF["seed"], HANDOFF["length"])
    key = source.prefill(prompt, **HANDOFF["sampling"])
    source.finish()
    made, pool = source.prefilled[key], source.core.loaded.memory.kv_pool()
    assert pool is not None
    file = tmp_path_factory.mktemp("blocks") / "one_rank"
    file.write_bytes(b"".join(bytes(pool.block(block)) for block in made.block_ids))
    return file, made.first.token_ids[0]


@pytest.fixture(scope="module")
def results(
    model_folder: Callable[[str], Path],
    prefilled_here: tuple[Path, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Return what one world of two ranks made of all these jobs, each in a new engine."""
    folder = tmp_path_factory.mktemp("world")
    file, first = prefilled_here
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, job: str, model: str, settings: dict[str, Any], **more: Any) -> None:
        jobs[name] = {
            "job": job,
            "model": str(model_folder(model)),
            "settings": {**SETTINGS, **settings},
            "subjects": SUBJECTS,
            **more,
        }

    for model in MODELS:
        add(model, "alone", model, {})
    for model in INVARIANT:
        add(f"{model} together", "together", model, {})
        add(f"{model} in pieces", "together", model, {"max_num_tokens": 16})
    add("tight", "together", "llama", {"kv_cache_config__max_tokens": 10 * 16})
    add("far", "without_pool", "llama", {}, far_apart=True)
    add("refused", "alone", NOT_DIVISIBLE, {})
    add("storm", "abort_storm", "llama", {}, count=80)
    add("prefill", "prefill", "llama", {}, **HANDOFF, file=str(folder / "two_ranks"))
    add("resume", "resume", "llama", {}, **HANDOFF, file=str(file), first=[first])
    code, output = end_of(world(folder, list(jobs.values())))
    assert code == 0, output
    made = json.loads((folder / "results.json").read_text())
    return {**dict(zip(jobs, made, strict=True)), "file": folder / "two_ranks"}


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_give_the_bits_of_one(results: dict[str, Any], single: Make, model: str) -> None:
    driver = single(model)
    for subject, (tokens, logprobs) in zip(SUBJECTS, results[model], strict=True):
        key = driver.add(prompt_of(subject["seed"], subject["length"]), **subject["sampling"])
        driver.finish()
        assert driver.tokens(key) == tokens
        expected = [entry.logprob for c in driver.chunks[key] for entry in c.logprobs or ()]
        assert logprobs == expected


@pytest.mark.parametrize("model", INVARIANT)
def test_with_two_ranks_too_tokens_do_not_depend_on_batch_and_chunks(
    results: dict[str, Any], model: str
) -> None:
    expected = results[model]
    assert results[f"{model} together"] == expected
    assert results[f"{model} in pieces"] == expected


def test_preemption_changes_no_token_of_two_ranks(results: dict[str, Any]) -> None:
    assert results["tight"] == results["llama"]


def test_an_abort_storm_leaves_no_block_and_ranks_in_step(results: dict[str, Any]) -> None:
    storm = results["storm"]
    assert storm["held"] == {}
    assert storm["left"] == [0, 0]
    assert storm["aborts"] > 60
    assert storm["answer"] == results["llama"][0]


def test_a_model_that_cannot_be_cut_is_refused_and_the_world_lives(
    results: dict[str, Any],
) -> None:
    refused = results["refused"]
    assert refused["error"] == "ConfigError"
    assert (
        "tensor_parallel_size 2 (override) does not divide num_key_value_heads 1 of"
        in (refused["message"])
    )
    assert "can be cut into 1" in refused["message"]


def test_a_prompt_computed_by_one_rank_is_decoded_by_two(
    results: dict[str, Any], single: Make
) -> None:
    prompt = prompt_of(HANDOFF["seed"], HANDOFF["length"])
    assert results["resume"] == single("llama").ask(prompt, **HANDOFF["sampling"])


def test_a_prompt_computed_by_two_ranks_is_decoded_by_one(
    results: dict[str, Any], single: Make, prefilled_here: tuple[Path, int]
) -> None:
    assert results["file"].read_bytes() == prefilled_here[0].read_bytes()
    assert results["prefill"]["tokens"] == [prefilled_here[1]]
    target = single("llama")
    prompt = prompt_of(HANDOFF["seed"], HANDOFF["length"])
    expected = single("llama").ask(prompt, **HANDOFF["sampling"])
    key = target.reserve(prompt, **HANDOFF["sampling"])
    target.finish()
    pool = target.core.loaded.memory.kv_pool()
    assert pool is not None
    assert results["prefill"]["layout"] == str(pool.layout)
    content, size = results["file"].read_bytes(), pool.layout.block_bytes
    for index, block in enumerate(target.reservations[key].block_ids):
        pool.block(block)[:] = content[index * size : (index + 1) * size]
    target.resume(key, TokenChunk(tuple(results["prefill"]["tokens"])))
    target.finish()
    assert target.tokens(key) == expected


def test_ranks_on_several_hosts_have_the_tokens_but_no_pool_to_move(
    results: dict[str, Any],
) -> None:
    has_none, answers = results["far"]
    assert has_none
    assert answers == results["llama"]


def job_of(folder: Path, job: str, **more: Any) -> dict[str, Any]:
    settings = SETTINGS
    return {"job": job, "model": str(folder), "settings": settings, "subjects": SUBJECTS, **more}


def test_four_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", num_kv_heads=4, dtype="bfloat16")
    jobs = [job_of(model, "alone"), job_of(model, "together")]
    for job in jobs:
        job["settings"] = {**SETTINGS, "tensor_parallel_size": 4}
    code, output = end_of(world(tmp_path, jobs, num_ranks=4))
    assert code == 0, output
    alone, together = json.loads((tmp_path / "results.json").read_text())
    assert together == alone
    config = default_config("torch", KEYS, **{**SETTINGS, "tensor_parallel_size": 1})
    one = Driver(load(model, config, lambda _share: None, 1), reuse=True, chunked=True)
    for subject, (tokens, _logprobs) in zip(SUBJECTS, alone, strict=True):
        prompt = prompt_of(subject["seed"], subject["length"])
        assert one.ask(prompt, **subject["sampling"]) == tokens


def test_killing_a_rank_ends_the_world(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    process = world(tmp_path, [job_of(model_folder("llama"), "compute_for_ever")])
    assert process.stdout is not None
    while "computing" not in (line := process.stdout.readline()):
        assert line, "the world ended before it computed"
    os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
    code, _output = end_of(process, 10)
    assert code != 0
    assert ends(tmp_path, 0)


def test_a_rank_that_fails_ends_the_world_and_says_why(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    job = job_of(model_folder("llama"), "alone", break_follower=True)
    code, output = end_of(world(tmp_path, [job]))
    assert code == 4
    assert "this rank is broken" in output
    assert ends(tmp_path, 0)


def test_when_rank_0_fails_callers_are_told_and_the_others_end_with_it(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    code, output = end_of(world(tmp_path, [job_of(model_folder("llama"), "die")]))
    ((error_code, message),) = json.loads((tmp_path / "results.json").read_text())
    assert error_code == "engine_dead"
    assert "cannot go on: a step failed" in message
    assert code == 4, output
    assert ends(tmp_path, 1)


def test_a_world_of_another_size_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    process = world(tmp_path, [job_of(model_folder("llama"), "alone")], num_ranks=1)
    code, output = end_of(process)
    assert code == 1
    assert (
        "tensor_parallel_size 2 needs an MPI world of 2 ranks, but this process is in one of 1"
        in (output)
    )


class SilentWorld:
    """Stands for a communicator on which a message comes after a while."""

    def __init__(self, clock: Callable[[], float], comes_at_s: float) -> None:
        self._clock = clock
        self._comes_at_s = comes_at_s

    def Get_rank(self) -> int:
        return 1

    def Get_size(self) -> int:
        return 2

    def Iprobe(self, **_options: object) -> bool:
        return self._clock() >= self._comes_at_s

    def Recv(self, _into: object, **_options: object) -> None:
        raise EOFError


def test_a_rank_that_waits_for_orders_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, naps = 0.0, []

    class Time:
        def monotonic(self) -> float:
            return now_s

        def sleep(self, seconds: float) -> None:
            nonlocal now_s
            naps.append(seconds)
            now_s += seconds

    class Mpi:
        BYTE = None

        class Status:
            def Get_count(self, _kind: object) -> int:
                return 0

    class Yielding:
        def sched_yield(self) -> None:
            nonlocal now_s
            now_s += 1e-5

    monkeypatch.setattr(ranks_module, "time", Time())
    monkeypatch.setattr(ranks_module, "os", Yielding())
    ranks = Ranks(SilentWorld(lambda: now_s, comes_at_s=1.0), Mpi)
    with pytest.raises(EOFError):
        ranks.receive()
    assert max(naps) == 1e-3
    assert len(naps) < 1100
    assert sum(naps) > 0.99
