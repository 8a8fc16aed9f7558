"""Plans of prefill and decode workers: names, commands, ranks, and what must be there before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy.commands import as_shell
from trtllm_workers.deploy.plan import Inventory, Plan, PlannedProcess, make_plan
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

INVENTORY = Inventory(
    python="/venv/bin/python",
    cwd=Path("/home/me"),
    num_cpus=8,
    mpiexec="/venv/bin/mpiexec",
    mpi_lacks=(),
)
FRACTION = "kv_cache_config.free_gpu_memory_fraction"


def config_of(ranks: int, fraction: Setting = Setting(0.9, "default")) -> EngineConfig:  # noqa: B008 - frozen
    settings = {"tensor_parallel_size": Setting(ranks, "p.yaml:1"), FRACTION: fraction}
    return EngineConfig("torch", settings)


def plan_of(
    inventory: Inventory = INVENTORY,
    *,
    prefill: EngineConfig | None = None,
    decode: EngineConfig | None = None,
    **settings: Any,
) -> Plan:
    configs = {Role.PREFILL: prefill or config_of(1), Role.DECODE: decode or config_of(1)}
    files = {
        "prefill_engine_config": Path("/configs/prefill.yaml"),
        "decode_engine_config": Path("/configs/decode.yaml"),
    }
    chosen = make_settings(**{"disaggregated": True, **files, **settings})
    return make_plan(chosen, inventory, RunFolder(Path("/runs/abc123")), configs)


def value_of(process: PlannedProcess, flag: str) -> str:
    return process.argv[process.argv.index(flag) + 1]


def test_shell_text_matches_its_golden_file(golden: Callable[[str, str], None]) -> None:
    plan = plan_of(
        model_path=Path("/models/my model"),
        strategy="prefill_first",
        num_decode_workers=2,
        kv_transport="nixl",
        max_local_prefill_length=128,
        handoff_max_timeout_s=60.0,
        decode=config_of(2),
    )
    golden("plan_disagg.txt", as_shell(plan))


def test_plan_has_workers_of_both_roles_and_an_ingress() -> None:
    plan = plan_of(num_prefill_workers=2)
    assert [(one.name, one.role) for one in plan.processes] == [
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
        ("ingress", "ingress"),
    ]
    assert plan.workers_in_words == "2 prefill workers and 1 decode worker"
    for worker in plan.processes[:-1]:
        assert value_of(worker, "--worker-id") == worker.name
        assert value_of(worker, "--role") == worker.role
        assert value_of(worker, "--engine-config") == f"/configs/{worker.role}.yaml"
        assert value_of(worker, "--kv-transport") == "ucx"


def test_ingress_is_told_the_strategy_and_nothing_of_transports() -> None:
    ingress = plan_of(kv_transport="tcp", strategy="prefill_first").processes[-1]
    assert value_of(ingress, "--strategy") == "prefill_first"
    assert "--kv-transport" not in ingress.argv


def test_aggregated_run_is_told_nothing_of_roles() -> None:
    plan = make_plan(make_settings(kv_transport="tcp"), INVENTORY, RunFolder(Path("/runs/a")))
    words = [word for process in plan.processes for word in process.argv]
    assert not {"--role", "--strategy", "--kv-transport"} & set(words)


def test_handoff_options_reach_both_roles() -> None:
    plan = plan_of(
        prefill_timeout_s=7.5,
        handoff_min_timeout_s=1.0,
        handoff_max_timeout_s=9.0,
        canary_interval_s=0.0,
        max_local_prefill_length=64,
    )
    for worker in plan.processes[:-1]:
        assert value_of(worker, "--prefill-timeout-s") == "7.5"
        assert value_of(worker, "--handoff-min-timeout-s") == "1"
        assert value_of(worker, "--handoff-max-timeout-s") == "9"
        assert value_of(worker, "--canary-interval-s") == "0"
        assert value_of(worker, "--max-local-prefill-length") == "64"


def test_workers_of_a_shared_discovery_have_names_of_their_run() -> None:
    plan = plan_of(discovery="file:///shared")
    assert value_of(plan.processes[0], "--worker-id") == "abc123-prefill-0"
    assert plan.processes[0].name == "prefill-0"


def test_worker_of_several_ranks_is_an_mpi_world() -> None:
    prefill, decode, _ = plan_of(decode=config_of(2)).processes
    assert (prefill.num_ranks, decode.num_ranks) == (1, 2)
    assert prefill.argv[0] == "/venv/bin/python"
    assert decode.argv[0] == "/venv/bin/mpiexec"
    at = decode.argv.index("-n")
    assert decode.argv[at : at + 8] == (
        *("-n", "2", "/venv/bin/python", "-P", "-m", "mpi4py", "-m", "trtllm_workers.cli.main"),
    )
    # Whatever SLURM variables or host names say, the ranks are children of this host.
    assert decode.argv[1:5] == ("-launcher", "fork", "-rmk", "user")


def test_threads_are_shared_by_all_ranks() -> None:
    plan = plan_of(prefill=config_of(2), decode=config_of(2))
    assert [one.env.get("OMP_NUM_THREADS") for one in plan.processes] == ["2", "2", None]


def test_roles_of_different_size_may_not_agree_and_that_is_said() -> None:
    assert plan_of(prefill=config_of(2), decode=config_of(2)).notes == ()
    (note,) = plan_of(prefill=config_of(2), decode=config_of(4)).notes
    assert note.startswith("tensor_parallel_size is 2 for prefill and 4 for decode: ")


@pytest.mark.parametrize("lacks", [("mpiexec",), ("mpi4py",), ("mpiexec", "mpi4py")])
def test_missing_mpi_is_said_with_the_command_that_brings_it(lacks: tuple[str, ...]) -> None:
    inventory = dataclasses.replace(INVENTORY, mpi_lacks=lacks)
    with pytest.raises(ConfigError) as caught:
        plan_of(inventory, decode=config_of(4))
    assert str(caught.value) == (
        "tensor_parallel_size 4 starts an MPI world, and this environment has no "
        f"{' and no '.join(lacks)}; run: pip install 'trtllm-launch[mpi]'"
    )
    assert plan_of(inventory).processes[0].num_ranks == 1


def test_missing_transport_is_said_before_a_worker_loads_its_model() -> None:
    inventory = dataclasses.replace(INVENTORY, transports_lack={"nixl": "nixl_cu12"})
    with pytest.raises(ConfigError) as caught:
        plan_of(inventory, kv_transport="nixl")
    assert str(caught.value) == (
        "KV transport nixl (--kv_transport) needs the Python package 'nixl_cu12', which is not "
        "installed; run: pip install 'trtllm-launch[nixl]', or take what is there with "
        "--kv-transport auto"
    )
    for other in ("ucx", "tcp", "auto"):
        plan = plan_of(inventory, kv_transport=other)
        assert value_of(plan.processes[0], "--kv-transport") == other


def test_sim_engine_needs_no_share_of_the_host() -> None:
    gpus = dataclasses.replace(INVENTORY, gpus=("0",))
    plan = plan_of(gpus, engine="sim", num_decode_workers=3)
    assert not any(
        {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & set(one.env) for one in plan.processes
    )
    assert plan.notes == ()


def test_roles_on_one_gpu_divide_its_memory_unless_somebody_has() -> None:
    one_gpu = dataclasses.replace(INVENTORY, gpus=("0",))
    for worker in plan_of(one_gpu).processes[:-1]:
        assert value_of(worker, "--set") == f"{FRACTION}=0.45"
    chosen = config_of(1, Setting(0.3, "p.yaml:9"))
    plan = plan_of(one_gpu, prefill=chosen, decode=chosen)
    assert "--set" not in plan.processes[0].argv
    assert "must leave memory to each other" in plan.notes[-1]


# --- the prefill queue -------------------------------------------------------------------------


def test_a_run_with_a_prefill_queue_starts_a_nats_server_first(
    golden: Callable[[str, str], None],
) -> None:
    plan = plan_of(prefill_dispatch="queue", max_prefill_queue_size=8)
    assert [one.name for one in plan.processes] == ["nats", "prefill-0", "decode-0", "ingress"]
    nats, *workers, ingress = plan.processes
    assert value_of(nats, "--folder") == "/runs/abc123/nats"
    for worker in workers:
        assert value_of(worker, "--prefill-dispatch") == "queue"
        assert value_of(worker, "--max-prefill-queue-size") == "8"
        assert value_of(worker, "--nats-status-file") == str(nats.status)
    assert "--prefill-dispatch" not in ingress.argv
    assert plan.workers_in_words == "1 prefill worker and 1 decode worker"
    golden("plan_queue.txt", as_shell(plan))


def test_a_server_that_was_named_is_used_by_workers() -> None:
    plan = plan_of(prefill_dispatch="queue", nats_server="nats://broker:4222")
    assert [one.name for one in plan.processes] == ["prefill-0", "decode-0", "ingress"]
    for worker in plan.processes[:-1]:
        assert value_of(worker, "--nats-server") == "nats://broker:4222"
        assert "--nats-status-file" not in worker.argv


def test_what_the_prefill_queue_lacks_is_told_with_the_remedy() -> None:
    lacking = dataclasses.replace(INVENTORY, queue_lacks=("nats-py", "nats-server"))
    with pytest.raises(ConfigError, match=r"needs nats-py and nats-server.*trtllm-launch\[nats\]"):
        plan_of(lacking, prefill_dispatch="queue")
    only_server = dataclasses.replace(INVENTORY, queue_lacks=("nats-server",))
    plan_of(only_server, prefill_dispatch="queue", nats_server="nats://broker:4222")
