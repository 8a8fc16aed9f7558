"""``worker`` and ``ingress``: what they are told on the command line is what they serve with."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trtllm_workers.cli import part, world
from trtllm_workers.cli.main import group
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.config.settings import Settings
from trtllm_workers.errors import ConfigError
from trtllm_workers.ingress import serve as ingress_serve
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.observe.status import read_status
from trtllm_workers.types import Role, Strategy
from trtllm_workers.worker import serve as worker_serve
from trtllm_workers.worker.serve import WorkerSettings

Invoke = Callable[..., None]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what the processes would have served with; they end at once."""
    taken: list[Any] = []

    async def serve(settings: object) -> None:
        taken.append(settings)

    monkeypatch.setattr(worker_serve, "serve_worker", serve)
    monkeypatch.setattr(ingress_serve, "serve_ingress", serve)
    monkeypatch.setattr(part, "run_loop", asyncio.run)
    monkeypatch.setattr(part, "begin_logs", lambda *_: None)
    return taken


@pytest.fixture
def invoke(tmp_path: Path, served: list[Any]) -> Invoke:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vision_config": {}}')
    discovery = (tmp_path / "discovery").as_uri()

    def call(*words: str, **env: str) -> None:
        environ = {"MODEL_PATH": str(model), "ENGINE": "sim", **env}
        done = CliRunner(env=environ).invoke(group, [*words, "--discovery", discovery])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output

    return call


def worker_of(served: list[Any]) -> WorkerSettings:
    (settings,) = served
    assert isinstance(settings, WorkerSettings)
    return settings


def test_decode_worker_serves_with_what_it_is_told(invoke: Invoke, served: list[Any]) -> None:
    invoke(
        *("worker", "--role", "decode", "--kv-transport", "nixl"),
        *("--max-local-prefill-length", "128", "--canary-interval-s", "0"),
        *("--prefill-timeout-s", "7", "--handoff-min-timeout-s", "2"),
        HANDOFF_MAX_TIMEOUT_S="9",
    )
    settings = worker_of(served)
    assert settings.role is Role.DECODE
    assert (settings.kv_transport, settings.max_local_prefill_length) == ("nixl", 128)
    assert (settings.canary_interval_s, settings.prefill_timeout_s) == (0.0, 7.0)
    assert (settings.handoff_min_timeout_s, settings.handoff_max_timeout_s) == (2.0, 9.0)


@pytest.mark.parametrize(
    ("role", "file"),
    [
        ("aggregated", "agg"),
        ("prefill", "prefill"),
        ("decode", "decode"),
        ("encode", "encode"),
    ],
)
def test_worker_takes_the_engine_config_of_its_role(
    invoke: Invoke, served: list[Any], role: str, file: str
) -> None:
    invoke("worker", "--role", role)
    assert f"{file}.yaml" in worker_of(served).engine_config.source("max_batch_size")


def test_worker_takes_the_variable_of_its_role_and_no_other(
    invoke: Invoke, served: list[Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("max_batch_size: 7\n")
    wrong = {"AGG_ENGINE_ARGS": "gone.yaml", "PREFILL_ENGINE_ARGS": "gone.yaml"}
    invoke("worker", "--role", "decode", DECODE_ENGINE_ARGS=str(mine), **wrong)
    assert worker_of(served).engine_config["max_batch_size"] == 7


def test_engine_config_flag_beats_the_variable_of_the_role(
    invoke: Invoke, served: list[Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("max_batch_size: 7\n")
    words = ("worker", "--role", "prefill", "--engine-config", str(mine))
    invoke(*words, PREFILL_ENGINE_ARGS="gone.yaml")
    assert worker_of(served).engine_config["max_batch_size"] == 7


def test_worker_is_told_what_it_may_load_for_images(
    invoke: Invoke, served: list[Any], tmp_path: Path
) -> None:
    invoke(
        *("worker", "--media-url-host", "a.example", "--max-images", "3"),
        ALLOWED_LOCAL_MEDIA_PATH=str(tmp_path),
        MAX_FILE_SIZE_MB="2",
    )
    settings = worker_of(served)
    assert settings.media.allowed_local_path == tmp_path
    assert (settings.media.url_hosts, settings.media.max_items) == (("a.example",), 3)
    assert settings.media.max_file_bytes == 2 << 20
    assert settings.takes_images


@pytest.mark.parametrize(
    ("role", "words", "encodes"),
    [
        ("aggregated", (), True),
        ("prefill", (), True),
        ("decode", (), False),
        ("encode", (), True),
        ("prefill", ("--encodes", "off"), False),
        ("decode", ("--encodes", "on"), True),
    ],
)
def test_who_loads_the_vision_tower(
    invoke: Invoke, served: list[Any], role: str, words: tuple[str, ...], encodes: bool
) -> None:
    invoke("worker", "--role", role, *words)
    assert worker_of(served).encodes is encodes
    assert worker_of(served).role is Role(role)


def test_modality_text_serves_a_vision_model_without_images(
    invoke: Invoke, served: list[Any]
) -> None:
    invoke("worker", MODALITY="text")
    assert not worker_of(served).takes_images


def test_an_encode_worker_that_could_not_encode_is_refused(invoke: Invoke) -> None:
    with pytest.raises(ConfigError, match="--role encode needs a model with a vision tower"):
        invoke("worker", "--role", "encode", MODALITY="text")
    with pytest.raises(ConfigError, match="--encodes: off, but --role is encode"):
        invoke("worker", "--role", "encode", "--encodes", "off")


@pytest.mark.parametrize(
    ("role", "words", "transport"),
    [
        ("aggregated", (), "auto"),
        ("encode", (), "auto"),
        ("prefill", (), "ucx"),
        ("decode", (), "ucx"),
        ("encode", ("--kv-transport", "ucx"), "ucx"),
    ],
)
def test_where_no_kv_moves_embeddings_take_the_best_transport_there_is(
    invoke: Invoke, served: list[Any], role: str, words: tuple[str, ...], transport: str
) -> None:
    invoke("worker", "--role", role, *words)
    assert worker_of(served).kv_transport == transport


def test_ingress_waits_as_long_as_it_is_told_for_images(invoke: Invoke, served: list[Any]) -> None:
    invoke("ingress", ENCODE_TIMEOUT_S="7")
    assert served[0].encode_timeout_s == 7.0


@pytest.mark.parametrize("strategy", Strategy)
def test_ingress_serves_with_its_strategy(
    invoke: Invoke, served: list[Any], strategy: Strategy
) -> None:
    invoke("ingress", DISAGGREGATION_STRATEGY=str(strategy))
    (settings,) = served
    assert isinstance(settings, IngressSettings)
    assert settings.strategy is strategy


def test_rank_above_0_follows_and_reports_no_step(
    invoke: Invoke, served: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    followed: list[Settings] = []
    monkeypatch.setattr(world, "rank_in_world", lambda _config: 1)
    monkeypatch.setattr(world, "follow", lambda settings, *_: followed.append(settings))
    status = tmp_path / "status.json"
    invoke("worker", "--status-file", str(status), PMI_RANK="1")
    assert len(followed) == 1
    assert served == []
    assert read_status(status) is None


def test_rank_0_serves_and_reports(
    invoke: Invoke, served: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(world, "rank_in_world", lambda _config: 0)
    status = tmp_path / "status.json"
    invoke("worker", "--status-file", str(status), PMI_RANK="0")
    assert worker_of(served).status_file == status
    assert read_status(status) is not None


def test_worker_without_tensor_parallelism_is_no_world() -> None:
    assert world.rank_in_world(EngineConfig("sim", {})) == 0
    one = {"tensor_parallel_size": Setting(1, "default")}
    assert world.rank_in_world(EngineConfig("torch", one)) == 0


def test_worker_outside_its_world_is_refused(tmp_path: Path) -> None:
    """In a process of its own: MPI cannot be unloaded."""
    words = ["worker", "--set", "tensor_parallel_size=2", "--discovery", tmp_path.as_uri()]
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=50,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("trtllm-launch: tensor_parallel_size 2 needs ")
