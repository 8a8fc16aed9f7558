"""launch/epd_disagg.sh with the real command: who starts with what, and what it says without a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "epd_disagg.sh"
PYTHON = re.compile(re.escape(str(Path(sys.executable).parent)) + r"/python[\d.]*")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "vl"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {}})
    )
    return folder


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCHER), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={
            "PATH": os.environ["PATH"],
            "TRTLLM_LAUNCH_VENV": str(Path(sys.executable).parents[1]),
            "ENGINE": "torch",
            "KV_TRANSPORT": "tcp",
            **env,
        },
    )


def dry_run(model: Path, *words: str, **env: str) -> str:
    done = run("--dry-run", *words, MODEL_PATH=str(model), **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(shown: str) -> dict[str, str]:
    """Return the printed commands by the name of their process."""
    pieces = re.split(r"^# ([a-z]+(?:-\d+)?)\n", shown, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_dry_run_matches_its_golden_file(
    model: Path, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    shown = dry_run(
        model,
        RUN_DIR=str(tmp_path / "runs"),
        ALLOWED_LOCAL_MEDIA_PATH=str(tmp_path),
        OMP_NUM_THREADS="1",
    )
    run_id = re.findall(r"# run ([0-9a-f]{6}):", shown)[0]
    shown = PYTHON.sub("/venv/bin/python", shown)
    for found, name in ((run_id, "RUN"), (str(tmp_path), "/tmp/x"), (str(ROOT), "/checkout")):
        shown = shown.replace(found, name)
    golden("dry_run_epd.txt", shown)
    assert not (tmp_path / "runs").exists()


def test_the_three_roles_get_a_gpu_each_in_the_order_of_the_reference(model: Path) -> None:
    gpus = {f"{role}_CUDA_VISIBLE_DEVICES": gpu for role, gpu in
            (("PREFILL", "0"), ("DECODE", "1"), ("ENCODE", "2"))}  # fmt: skip
    found = commands(dry_run(model, **gpus))
    for name, gpu in (("prefill-0", "0"), ("decode-0", "1"), ("encode-0", "2")):
        assert f"CUDA_VISIBLE_DEVICES={gpu} " in found[name]


def test_only_the_encode_worker_loads_the_vision_tower(model: Path) -> None:
    found = commands(dry_run(model, NUM_ENCODE_WORKERS="2"))
    assert sorted(found) == ["decode-0", "encode-0", "encode-1", "ingress", "prefill-0"]
    assert "--encodes off" in found["prefill-0"]
    assert "--role encode" in found["encode-1"]
    assert "--encodes" not in found["encode-0"] + found["decode-0"]  # by themselves: on, and off


def test_local_files_are_those_of_the_temporary_folder_unless_told(
    model: Path, tmp_path: Path
) -> None:
    assert "--allowed-local-media-path /tmp " in dry_run(model)
    assert f"--allowed-local-media-path {tmp_path} " in dry_run(model, TMPDIR=str(tmp_path))
    assert "--allowed-local-media-path" not in dry_run(model, ALLOWED_LOCAL_MEDIA_PATH="")


def test_limits_of_the_reference_reach_the_workers(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "it's encode.yaml"
    config.write_text("max_batch_size: 4\n")
    found = commands(dry_run(model, MAX_FILE_SIZE_MB="7", ENCODE_ENGINE_ARGS=str(config)))
    assert "it'\"'\"'s encode.yaml" in found["encode-0"]
    for name in ("prefill-0", "decode-0", "encode-0"):
        assert "--max-file-size-mb 7" in found[name]
        assert "--modality multimodal" in found[name]
    assert "max-file-size" not in found["ingress"]


def test_embeddings_of_another_dtype_are_refused_before_anything_starts(
    model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "e.yaml"
    config.write_text("dtype: float16\n")
    done = run(MODEL_PATH=str(model), ENCODE_ENGINE_ARGS=str(config))
    assert done.returncode == 2
    assert "encode workers hand embeddings over as they are, but differ" in done.stderr
    assert re.search(r"dtype is float16 \(\S*e\.yaml:1\) for encode and auto", done.stderr)
    assert "--set dtype=VALUE sets it for all" in done.stderr


def test_without_a_model_it_says_where_to_get_one() -> None:
    done = run()
    assert done.returncode == 2
    assert "environment MODALITY: multimodal, but the demo model takes text only" in done.stderr
    assert "python -m trtllm_workers.demo.vision --family qwen2_vl --out DIR" in done.stderr


def test_modality_text_and_encode_workers_are_refused_together(model: Path) -> None:
    done = run(MODEL_PATH=str(model), MODALITY="text")
    assert done.returncode == 2
    assert done.stderr == (
        "trtllm-launch: environment NUM_ENCODE_WORKERS: encode workers have nothing to do with modality "
        "text (environment MODALITY); take one of the two back\n"
    )


def test_encode_endpoint_of_dynamo_is_said_to_have_no_effect(model: Path) -> None:
    done = run("--dry-run", MODEL_PATH=str(model), ENCODE_ENDPOINT="dyn://a.b.generate")
    assert done.returncode == 0
    assert "note: environment ENCODE_ENDPOINT is set, but has no effect" in done.stderr
