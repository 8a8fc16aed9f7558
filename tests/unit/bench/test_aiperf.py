from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import aiperf as fake
from trtllm_workers.bench import aiperf
from trtllm_workers.bench.clients import Aiperf, find_aiperf
from trtllm_workers.bench.connection import Target
from trtllm_workers.bench.prompts import Prompts, Words
from trtllm_workers.bench.results import level_of
from trtllm_workers.bench.workload import Load, Workload
from trtllm_workers.errors import ConfigError, StartError

WORKLOAD = Workload(isl=100, osl=5)
LOAD = Load(concurrency=4, num_requests=8, num_warmup=2)


def argv(tmp_path: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "url": "http://h:1",
        "model": "m",
        "tokenizer": Path("/t"),
        "workload": WORKLOAD,
        "load": LOAD,
        "template_tokens": 5,
        "ending": {"min_tokens": 5, "ignore_eos": True},
        "timeout_s": 60.0,
        "seed": 7,
        "folder": tmp_path / "out",
    }
    return aiperf.argv("aiperf", **(given | changes))


@pytest.fixture
def on_path(tmp_path: Path) -> str:
    """A folder for PATH in which aiperf is our stand-in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "aiperf"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {fake.__file__} "$@"\n')
    program.chmod(0o755)
    return str(folder)


def test_the_command_asks_for_this_workload(tmp_path: Path) -> None:
    words = argv(tmp_path)
    assert words[:4] == ["aiperf", "profile", "--model", "m"]
    pairs = dict(itertools.pairwise(words))
    assert pairs["--synthetic-input-tokens-mean"] == "95"
    assert pairs["--synthetic-input-tokens-stddev"] == "0"
    assert pairs["--output-tokens-mean"] == "5"
    assert (pairs["--concurrency"], pairs["--request-count"]) == ("4", "8")
    assert (pairs["--warmup-request-count"], pairs["--num-dataset-entries"]) == ("2", "10")
    assert (pairs["--random-seed"], pairs["--tokenizer"]) == ("7", "/t")
    extra = [words[n + 1] for n, word in enumerate(words) if word == "--extra-inputs"]
    assert extra == ["min_tokens:5", "ignore_eos:true"]
    assert {"--streaming", "--use-server-token-count"} <= set(words)


def test_an_open_loop_and_a_shared_prefix_have_their_own_words(tmp_path: Path) -> None:
    load = Load(request_rate=2.5, num_requests=8, num_warmup=0)
    workload = Workload(isl=100, osl=5, shared_prefix=40)
    words = argv(tmp_path, load=load, workload=workload, tokenizer=None)
    pairs = dict(itertools.pairwise(words))
    assert (pairs["--request-rate"], pairs["--request-rate-mode"]) == ("2.5", "poisson")
    assert pairs["--synthetic-input-tokens-mean"] == "55"
    assert pairs["--shared-system-prompt-length"] == "40"
    assert not {"--concurrency", "--tokenizer", "--warmup-request-count"} & set(words)


def test_its_records_become_ours(tmp_path: Path) -> None:
    fake.main(argv(tmp_path)[1:])
    records, version = aiperf.read(tmp_path / "out", WORKLOAD)
    assert version == "0.13.0"
    assert len(records) == 8
    assert {record.problem for record in records} == {""}
    level = level_of(LOAD, records)
    assert level.ttft_s.p50 == pytest.approx(0.02)
    assert level.itl_s.p50 == pytest.approx(0.01)
    assert level.duration_s == pytest.approx(0.76)
    assert level.output_tokens == 40


def test_its_failures_are_named_and_counted(tmp_path: Path) -> None:
    workload = Workload(isl=102, osl=5)
    fake.main(argv(tmp_path, workload=workload)[1:])
    records, _ = aiperf.read(tmp_path / "out", workload)
    level = level_of(LOAD, records)
    assert level.failures == {"HTTP 429: queue is full": 2}
    assert not level.valid


def test_answers_of_another_length_are_wrong(tmp_path: Path) -> None:
    fake.main(argv(tmp_path)[1:])
    records, _ = aiperf.read(tmp_path / "out", Workload(isl=100, osl=6))
    assert {record.problem for record in records} == {"answer of 5 tokens, not 6"}
    records, _ = aiperf.read(tmp_path / "out", Workload(isl=200, osl=5))
    assert {record.problem for record in records} == {"prompt of 100 tokens, not 200"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "aiperf left no"),
        ("", "holds no measured request"),
        ("{no", "cannot be read"),
        ('{"metadata": {}}', "has another form than that of aiperf 0.13"),
    ],
)
def test_files_of_another_form_are_refused(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / aiperf.RECORDS).write_text(content)
    with pytest.raises(StartError, match=complaint):
        aiperf.read(tmp_path, WORKLOAD)


async def test_the_program_is_run_and_gets_another_seed_at_every_level(
    tmp_path: Path, on_path: str
) -> None:
    program = find_aiperf("auto", on_path)
    assert program == f"{on_path}/aiperf"
    asker = Aiperf(
        program,
        Prompts("m", WORKLOAD, Words({"a": 1}, 6, 5), ("ignore_eos",)),
        WORKLOAD,
        url=Target("http://h:1").url,
        model="m",
        tokenizer=None,
        timeout_s=10.0,
    )
    seeds = set()
    for streams in (4, 8):
        folder = tmp_path / f"concurrency{streams}"
        load = Load(concurrency=streams, num_requests=8, num_warmup=2)
        records, cpu_s = await asker.measure(load, folder, 100)
        assert (len(records), cpu_s, asker.name) == (8, None, "aiperf 0.13.0")
        words = json.loads((folder / "aiperf" / "argv.json").read_text())
        seeds.add(words[words.index("--random-seed") + 1])
    assert len(seeds) == 2


async def test_a_program_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    program = tmp_path / "aiperf"
    program.write_text("#!/bin/sh\necho no tokenizer; exit 3\n")
    program.chmod(0o755)
    prompts = Prompts("m", WORKLOAD, Words({"a": 1}, 6, 5), ())
    asker = Aiperf(
        str(program), prompts, WORKLOAD, url="http://h:1", model="m", tokenizer=None, timeout_s=1.0
    )
    with pytest.raises(StartError, match=r"aiperf left no(.|\n)*no tokenizer"):
        await asker.measure(LOAD, tmp_path, 1)


def test_aiperf_is_found_or_asked_for_by_name(tmp_path: Path, on_path: str) -> None:
    assert find_aiperf("own", on_path) is None
    assert find_aiperf("auto", str(tmp_path)) is None
    with pytest.raises(ConfigError, match="pip install aiperf"):
        find_aiperf("aiperf", str(tmp_path))
