"""``doctor`` and ``up`` on hosts with and without TensorRT-LLM: a fake nvidia-smi, metadata on PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKES = Path(__file__).resolve().parents[1] / "fakes"


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """Variables of a host with two GPUs and no TensorRT-LLM."""
    programs = tmp_path / "bin"
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "facts = {'name': 'NVIDIA H200', 'memory.total': '143771', 'memory.used': '0',\n"
        "         'driver_version': os.environ['DRIVER'], 'compute_cap': '9.0'}\n"
        "asked = next(one for one in sys.argv if one.startswith('--query-gpu='))\n"
        "for _ in range(2):\n"
        "    print(', '.join(facts[one] for one in asked.partition('=')[2].split(',')))\n"
    )
    smi.chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "0,1",
        "DRIVER": "590.44.01",
    }


def with_trtllm(host: dict[str, str], version: str) -> dict[str, str]:
    return host | {"PYTHONPATH": str(FAKES / "dist_info" / version)}


def launcher(host: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", *words],
        env=host,
        cwd=host["HOME"],
        capture_output=True,
        text=True,
        timeout=50,
    )


def doctor(host: dict[str, str], *words: str) -> dict[str, dict[str, str]]:
    done = launcher(host, "doctor", "--json", "--http-port", "0", *words)
    found = {one["subject"]: one for one in json.loads(done.stdout)}
    bad = any(one["level"] == "problem" for one in found.values())
    assert done.returncode == (2 if bad else 0), done.stderr
    return found


def levels(found: dict[str, dict[str, str]]) -> set[str]:
    return {one["level"] for one in found.values()}


def test_doctor_finds_a_good_host_in_order(host: dict[str, str]) -> None:
    found = doctor(with_trtllm(host, "1.2.1"), "--engine", "trtllm", "--disaggregated")
    assert "problem" not in levels(found), found
    assert (found["TensorRT-LLM"]["level"], found["TensorRT-LLM"]["text"]) == ("ok", "1.2.1")
    assert found["gpus"]["text"] == "2 GPUs visible, 2 needed"
    assert found["driver"]["text"].startswith("590.44.01, compute capability 9.0")
    assert "UCX" in found["KV transport"]["text"]
    assert "numpy<2" in found["packages of TensorRT-LLM"]["text"]


def test_doctor_tells_each_thing_that_keeps_it_from_running(host: dict[str, str]) -> None:
    old = with_trtllm(host, "1.2.0") | {"DRIVER": "570.86.15", "CUDA_VISIBLE_DEVICES": "0"}
    found = doctor(old, "--engine", "trtllm", "--num-workers", "2")
    assert "#12770" in found["TensorRT-LLM"]["text"]
    assert found["gpus"]["text"].startswith("2 workers need 2 GPUs, and 1 is visible")
    assert "570.86.15" in found["driver"]["text"]
    for subject in ("TensorRT-LLM", "gpus", "driver"):
        assert found[subject]["level"] == "problem"
        assert found[subject]["fix"]


def test_doctor_says_where_a_missing_package_comes_from(host: dict[str, str]) -> None:
    found = doctor(host, "--engine", "trtllm")
    assert found["TensorRT-LLM"]["text"] == "TensorRT-LLM is not installed"
    assert "pypi.nvidia.com" in found["TensorRT-LLM"]["fix"]
    assert "nvcr.io/nvidia/tensorrt-llm/release:1.2.1" in found["TensorRT-LLM"]["fix"]


@pytest.mark.parametrize(
    ("version", "environ", "said"),
    [
        ("", {}, "TensorRT-LLM is not installed"),
        ("1.2.0", {}, "TensorRT-LLM 1.2.0 is refused"),
        ("1.2.1", {"CUDA_VISIBLE_DEVICES": ""}, "no GPU is visible"),
        ("1.2.1", {"DRIVER": "570.86.15"}, "the NVIDIA driver is 570.86.15"),
    ],
    ids=["missing", "refused", "no GPU", "old driver"],
)
def test_up_starts_nothing_where_trtllm_cannot_run(
    host: dict[str, str], version: str, environ: dict[str, str], said: str
) -> None:
    here = (with_trtllm(host, version) if version else host) | environ
    done = launcher(here, "up", "--engine", "trtllm", "--http-port", "0")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not list(Path(host["HOME"]).rglob("run.json"))


def test_a_plan_can_be_made_where_trtllm_is_not(host: dict[str, str]) -> None:
    done = launcher(host, "up", "--engine", "trtllm", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--engine trtllm" in done.stdout


@pytest.mark.parametrize(
    ("version", "environ", "source"),
    [
        ("", {}, "auto takes torch: TensorRT-LLM is not installed"),
        ("1.2.0", {}, "auto takes torch: TensorRT-LLM 1.2.0 is refused"),
        ("1.2.1", {"CUDA_VISIBLE_DEVICES": ""}, "auto takes torch: TensorRT-LLM is installed, but"),
        ("1.2.1", {}, "auto takes trtllm: TensorRT-LLM 1.2.1 and a GPU are here"),
    ],
    ids=["missing", "refused", "no GPU", "good"],
)
def test_the_source_of_the_engine_says_why_auto_took_it(
    host: dict[str, str], version: str, environ: dict[str, str], source: str
) -> None:
    here = (with_trtllm(host, version) if version else host) | environ
    done = launcher(here, "plan", "--show-config")
    assert done.returncode == 0, done.stderr
    assert source in done.stdout
