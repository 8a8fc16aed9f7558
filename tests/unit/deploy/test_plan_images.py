"""Plans of runs that take images: encode workers, who encodes, what must be there before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy.plan import Inventory, Plan, PlannedProcess, make_plan
from trtllm_workers.deploy.ready import Ladder
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.status import Status
from trtllm_workers.types import Role

FRACTION = "kv_cache_config.free_gpu_memory_fraction"
FILES = {f"{role}_engine_config": Path(f"/c/{role}.yaml") for role in ("prefill", "decode", "encode")}  # fmt: skip


def inventory(*gpus: str, **more: Any) -> Inventory:
    return Inventory(python="/venv/bin/python", cwd=Path("/home/me"), num_cpus=8, gpus=gpus, **more)


def plan_of(host: Inventory | None = None, **settings: Any) -> Plan:
    config = EngineConfig("torch", {FRACTION: Setting(0.9, "default")})
    chosen = {"modality": "multimodal", "num_encode_workers": 1, **FILES, **settings}
    return make_plan(
        make_settings(**chosen),
        host or inventory(),
        RunFolder(Path("/runs/abc123")),
        dict.fromkeys(Role, config),
    )


def named(plan: Plan) -> dict[str, PlannedProcess]:
    return {one.name: one for one in plan.processes}


def gpus_of(plan: Plan) -> dict[str, str]:
    return {
        one.name: one.env["CUDA_VISIBLE_DEVICES"]
        for one in plan.processes
        if "CUDA_VISIBLE_DEVICES" in one.env
    }


def test_encode_workers_come_beside_prefill_and_decode_ones() -> None:
    plan = plan_of(disaggregated=True, num_encode_workers=2)
    assert [(one.name, one.role) for one in plan.processes] == [
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
        ("encode-0", "encode"),
        ("encode-1", "encode"),
        ("ingress", "ingress"),
    ]
    assert plan.workers_in_words == "1 prefill worker, 1 decode worker and 2 encode workers"
    encode = named(plan)["encode-1"].argv
    assert encode[encode.index("--role") + 1] == "encode"
    assert encode[encode.index("--engine-config") + 1] == "/c/encode.yaml"
    assert "--strategy" not in encode


def test_encode_workers_come_beside_aggregated_ones_as_well() -> None:
    plan = plan_of()
    assert [one.name for one in plan.processes] == ["worker-0", "encode-0", "ingress"]
    worker = named(plan)["worker-0"].argv
    assert worker[worker.index("--encodes") + 1] == "off"
    assert plan.workers_in_words == "1 worker and 1 encode worker"


def test_without_encode_workers_the_others_encode() -> None:
    for disaggregated in (False, True):
        plan = plan_of(num_encode_workers=0, disaggregated=disaggregated)
        assert not [one for one in plan.processes if "--encodes" in one.argv]


def test_transport_of_embeddings_is_said_only_where_it_was_asked_for() -> None:
    silent = named(plan_of())
    asked = named(plan_of(kv_transport="tcp"))
    for name in ("worker-0", "encode-0"):
        assert "--kv-transport" not in silent[name].argv
        assert asked[name].argv[asked[name].argv.index("--kv-transport") + 1] == "tcp"
    assert "--kv-transport" not in asked["ingress"].argv


def test_each_role_gets_a_gpu_and_the_encode_worker_the_third() -> None:
    plan = plan_of(inventory("0", "1", "2"), disaggregated=True)
    assert gpus_of(plan) == {"prefill-0": "0", "decode-0": "1", "encode-0": "2"}


def test_named_gpus_are_taken_as_named() -> None:
    plan = plan_of(
        inventory("0", "1", "2", "3"),
        disaggregated=True,
        num_encode_workers=2,
        encode_cuda_visible_devices="3,1",
        prefill_cuda_visible_devices="0",
        decode_cuda_visible_devices="2",
    )
    assert gpus_of(plan) == {
        "prefill-0": "0",
        "decode-0": "2",
        "encode-0": "3",
        "encode-1": "1",
    }


def test_sharing_a_gpu_is_said_and_the_encode_worker_takes_no_kv_memory() -> None:
    plan = plan_of(inventory("0"), disaggregated=True)
    assert set(gpus_of(plan).values()) == {"0"}
    assert "prefill, decode and encode share GPU 0" in plan.notes
    processes = named(plan)
    assert [word for word in processes["prefill-0"].argv if FRACTION in word] == [f"{FRACTION}=0.3"]
    assert not [word for word in processes["encode-0"].argv if FRACTION in word]


def test_a_role_left_without_a_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="ENCODE_CUDA_VISIBLE_DEVICES"):
        plan_of(
            inventory("0", "1"),
            disaggregated=True,
            prefill_cuda_visible_devices="0",
            decode_cuda_visible_devices="1",
        )


def test_limits_reach_workers_and_the_ingress_gets_its_deadline() -> None:
    plan = plan_of(
        allowed_local_media_path=Path("/media files"),
        media_url_host=("a.example", "b.example:8080"),
        allow_pickle_embeddings=True,
        encode_timeout_s=5.0,
    )
    processes = named(plan)
    for name in ("worker-0", "encode-0"):
        words = processes[name].argv
        assert words[words.index("--allowed-local-media-path") + 1] == "/media files"
        hosts = [words[at + 1] for at, word in enumerate(words) if word == "--media-url-host"]
        assert hosts == ["a.example", "b.example:8080"]
        assert "--allow-pickle-embeddings" in words
        assert "--encode-timeout-s" not in words
    ingress = processes["ingress"].argv
    assert ingress[ingress.index("--encode-timeout-s") + 1] == "5"
    assert "--allow-pickle-embeddings" not in ingress


def test_missing_packages_are_named_before_anything_starts() -> None:
    host = inventory(vision_lacks=("pillow", "transformers"))
    with pytest.raises(ConfigError, match=r"packages pillow and transformers, .*\[vision\]"):
        plan_of(host)
    plan_of(host, modality="text", num_encode_workers=0)
    with pytest.raises(ConfigError, match="run: pip install pillow transformers, or"):
        plan_of(host, engine="trtllm")


def test_an_encode_worker_is_ready_once_it_is_registered() -> None:
    ladder = Ladder({"encode-0": "encode"}, 0.0)
    ladder.observe("encode-0", Status(step="model", since=0.0, done=1.0), 1.0)
    assert not ladder.ready
    ladder.observe("encode-0", Status(step="registered", since=0.0), 2.0)
    assert ladder.ready
