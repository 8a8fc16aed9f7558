"""``trtllm-launch lint`` as a process: roles, pairs, formats, exit codes, what it says to wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trtllm_workers.config.shipped import shipped_engine_configs
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.roles_of_files import role_and_path, role_of
from trtllm_workers.types import Role

PREFILL = "disable_overlap_scheduler: true\ncache_transceiver_config: {backend: UCX, "
PREFILL += "max_tokens_in_buffer: 4096, kv_transfer_timeout_ms: 60000}\nmax_seq_len: 4096\n"
DECODE = PREFILL.replace("disable_overlap_scheduler: true\n", "")


def lint(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "trtllm_workers.cli.main", "lint", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=30,
    )


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    (tmp_path / "prefill.yaml").write_text(PREFILL)
    (tmp_path / "decode.yaml").write_text(DECODE)
    return tmp_path


def test_a_right_pair_has_nothing_wrong(pair: Path) -> None:
    done = lint("prefill.yaml", "decode.yaml", "--isl", "3000", "--osl", "1000", cwd=pair)
    assert (done.returncode, done.stdout) == (0, "2 files: nothing wrong\n"), done.stdout


def test_the_shipped_configs_are_checked_without_files_in_well_under_a_second() -> None:
    began_s = time.monotonic()
    done = lint()
    took_s = time.monotonic() - began_s
    assert done.returncode in (0, 1), done.stdout
    assert f"{len(shipped_engine_configs())} files" in done.stdout
    assert " error" not in done.stdout
    assert took_s < 5  # a process on a busy machine; the benchmark has the figure


def test_a_pair_that_does_not_fit_is_told_with_both_files(pair: Path) -> None:
    text = (pair / "decode.yaml").read_text().replace("UCX", "NIXL")
    (pair / "decode.yaml").write_text(text + "kv_cache_config: {tokens_per_block: 64}\n")
    done = lint("prefill.yaml", "decode.yaml", "--format", "json", cwd=pair)
    assert done.returncode == 2
    found = {one["rule"]: one for one in json.loads(done.stdout)}
    assert "prefill.yaml" in found["pair-transceiver"]["message"]
    assert found["pair-transceiver"]["line"] == 1


def test_fix_writes_and_then_checks_what_is_left(pair: Path) -> None:
    path = pair / "prefill.yaml"
    path.write_text(PREFILL + "kv_cache_dtype: fp8\n")
    assert lint("prefill.yaml", cwd=pair).returncode == 2
    done = lint("--fix", "prefill.yaml", cwd=pair)
    assert done.returncode == 0, done.stdout
    assert "kv_cache_dtype is now kv_cache_config.dtype" in done.stderr
    assert "  dtype: fp8" in path.read_text()


def test_a_file_that_is_missing_or_no_yaml_is_an_error(pair: Path) -> None:
    (pair / "agg.yaml").write_text("a: [")
    done = lint("agg.yaml", "nowhere.yaml", cwd=pair)
    assert done.returncode == 2
    assert "there is no file nowhere.yaml" in done.stdout
    assert "agg.yaml:1" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trtllm", "9.9"), "TensorRT-LLM 9.9 are not known here; known: 1.2.1"),
        (("--isl", "0"), "--isl"),
        (("--routr", "kv"), "did you mean --router?"),
        (("worker=a.yaml",), "'worker' in worker=a.yaml is no role"),
    ],
)
def test_wrong_arguments_are_named(words: tuple[str, ...], said: str) -> None:
    done = lint(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("prefill.yaml", Role.PREFILL),
        ("mtp_decode.yaml", Role.DECODE),
        ("ctx_4x8.yaml", Role.PREFILL),
        ("gen/config.yaml", Role.DECODE),
        ("encode.yaml", Role.ENCODE),
        ("agg.yaml", Role.AGGREGATED),
        ("anything.yaml", Role.AGGREGATED),
    ],
)
def test_a_file_s_role_is_in_its_name(path: str, role: Role) -> None:
    assert role_of(Path("configs") / path) is role


def test_a_role_may_stand_before_the_file() -> None:
    assert role_and_path("decode=prefill.yaml") == (Role.DECODE, Path("prefill.yaml"))
    with pytest.raises(ConfigError, match="is no role"):
        role_and_path("router=a.yaml")
