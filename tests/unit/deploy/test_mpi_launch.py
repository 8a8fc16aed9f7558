"""How the ranks of TensorRT-LLM workers start: pure, so every case is a value."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.config.env import ARGUMENTS, ARGUMENTS_FLAG, RANK_ENV, WORLD_SIZE
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy.commands import as_shell
from trtllm_workers.deploy.mpi import through_llmapi_launch, world_of
from trtllm_workers.deploy.plan import Inventory, Plan, make_plan
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.deploy.shm import EPLB_SHM_NAME, remove_left_overs, shm_name
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

EIGHT = tuple(map(str, range(8)))
MODULE = ["-P", "-m", "trtllm_workers.cli.main", "worker"]
RANK_MODULE = ["-P", "-m", "mpi4py", "-m", "trtllm_workers.cli.main", "worker"]


def host(**changes: Any) -> Inventory:
    given: dict[str, Any] = {
        "python": "/venv/bin/python",
        "cwd": Path("/home/me"),
        "gpus": EIGHT,
        "host_env": {},
        "hostname": "head",
        "is_root": False,
    }
    return Inventory(**given | changes)


OPEN_MPI = {"mpirun": "/usr/bin/mpirun", "mpi_flavour": "openmpi"}
MPICH = {"mpirun": "/opt/bin/mpirun", "mpi_flavour": "mpich"}


def config(**sizes: int) -> EngineConfig:
    return EngineConfig("trtllm", {key: Setting(size, "a.yaml:1") for key, size in sizes.items()})


def plan_of(inventory: Inventory, *, tp: int = 1, pp: int = 1, **settings: Any) -> Plan:
    sizes = config(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    configs = dict.fromkeys(Role, sizes)
    chosen = make_settings(engine="trtllm", **settings)
    return make_plan(chosen, inventory, RunFolder(Path("/runs/abc123")), configs)


def before_module(plan: Plan) -> list[str]:
    words = list(plan.processes[0].argv)
    return words[: words.index("/venv/bin/python")]


def after_python(plan: Plan, length: int) -> list[str]:
    words = list(plan.processes[0].argv)
    at = words.index("/venv/bin/python") + 1
    return words[at : at + length]


def test_world_is_the_product_of_the_parallel_sizes() -> None:
    assert world_of(None).size == 1
    world = world_of(config(tensor_parallel_size=4, pipeline_parallel_size=2))
    assert (world.size, world.in_words) == (
        8,
        "tensor_parallel_size 4 × pipeline_parallel_size 2 = 8 ranks",
    )
    assert world_of(config(context_parallel_size=2)).in_words == "context_parallel_size 2"


@pytest.mark.parametrize("asked", ["auto", "mpirun", "spawn"])
def test_one_rank_needs_no_mpi_program(asked: str) -> None:
    plan = plan_of(host(**OPEN_MPI), mpi_launch=asked)
    assert before_module(plan) == []
    assert after_python(plan, 4) == MODULE
    assert RANK_ENV not in plan.processes[0].env


def test_mpi_cmd_comes_before_the_command_of_each_worker_and_no_other() -> None:
    plan = plan_of(host(), mpi_cmd="mpirun -n 1 --oversubscribe -x 'A B'")
    assert before_module(plan) == ["mpirun", "-n", "1", "--oversubscribe", "-x", "A B"]
    assert "mpirun" not in plan.processes[-1].argv
    with pytest.raises(ConfigError, match=r"--mpi-cmd: No closing quotation"):
        plan_of(host(), mpi_cmd="mpirun '")


def test_ranks_that_mpi_cmd_may_start_are_not_waited_for() -> None:
    worker = plan_of(host(), tp=2, mpi_cmd="mpirun -n 1").processes[0]
    assert worker.num_ranks == 1
    assert worker.is_world
    assert WORLD_SIZE not in worker.env


def test_open_mpi_gets_every_variable_by_name() -> None:
    environ = {"UCX_TLS": "rc", "HF_TOKEN": "hf_abc", "EDITOR": "vi", "OMPI_MCA_btl": "self"}
    plan = plan_of(host(**OPEN_MPI, host_env=environ), tp=2)
    names = [
        "CUDA_VISIBLE_DEVICES",
        "HF_TOKEN",
        "OMPI_MCA_btl",
        "PYTHONFAULTHANDLER",
        "PYTHONUNBUFFERED",
        "TRTLLM_EPLB_SHM_NAME",
        RANK_ENV,
        WORLD_SIZE,
        "UCX_TLS",
    ]
    assert before_module(plan) == [
        *("/usr/bin/mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none"),
        *(word for name in names for word in ("-x", name)),
    ]
    assert after_python(plan, 6) == RANK_MODULE
    worker = plan.processes[0]
    assert worker.env[WORLD_SIZE] == "2"
    assert worker.num_ranks == 2
    assert worker.term_to_leader
    assert json.loads(worker.env[RANK_ENV]) == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMPI_MCA_btl": "self",
        "TRTLLM_EPLB_SHM_NAME": "trtllm_launch_abc123_worker-0",
        "UCX_TLS": "rc",
    }
    assert "hf_abc" not in as_shell(plan)


def test_open_mpi_is_allowed_to_run_as_root_only_for_root() -> None:
    assert "--allow-run-as-root" in before_module(plan_of(host(**OPEN_MPI, is_root=True), tp=2))
    assert "--allow-run-as-root" not in before_module(plan_of(host(**OPEN_MPI), tp=2))


def test_mpich_starts_ranks_on_this_host_whatever_slurm_says() -> None:
    plan = plan_of(host(**MPICH), tp=4, pp=2)
    assert before_module(plan) == [
        *("/opt/bin/mpirun", "-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1"),
        *("-genvall", "-n", "8"),
    ]
    assert not plan.processes[0].term_to_leader
    assert plan.processes[0].env["CUDA_VISIBLE_DEVICES"] == ",".join(EIGHT)


def test_without_mpirun_tensorrt_llm_spawns_and_sees_no_other_world() -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "PMIX_RANK": "0",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_MCA_btl": "self",
        "OMPI_MCA_ess_base_vpid": "0",
        "PATH": "/bin",
    }
    plan = plan_of(host(host_env=environ), tp=2)
    worker = plan.processes[0]
    assert before_module(plan) == []
    assert worker.unset == set(environ) - {"OMPI_MCA_btl", "PATH"}
    assert worker.num_ranks == 1
    assert "OMPI_* and PMIX_* and SLURM_* variables (4) are kept from the workers" in plan.notes[0]
    unset = "env -u OMPI_COMM_WORLD_RANK -u OMPI_MCA_ess_base_vpid -u PMIX_RANK -u SLURM_JOB_ID "
    assert unset in as_shell(plan)


def test_spawn_is_taken_when_asked_for_though_mpirun_is_there() -> None:
    assert before_module(plan_of(host(**OPEN_MPI), tp=2, mpi_launch="spawn")) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, "none is here"), ({"mpirun": "/usr/bin/mpirun"}, "names neither Open MPI nor MPICH")],
)
def test_mpirun_that_is_asked_for_and_not_there_is_told(
    changes: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan_of(host(**changes), tp=2, mpi_launch="mpirun")


SLURM = {"in_slurm_job": True, "host_env": {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}}


def test_world_larger_than_a_node_takes_one_srun_over_its_nodes() -> None:
    plan = plan_of(host(**SLURM), tp=16, num_workers=2)
    assert before_module(plan) == [
        *("srun", "--mpi=pmix", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"),
        *("--relative=0", "--overlap", "--oversubscribe", "--cpu-bind=none", "--export=ALL"),
        *("--kill-on-bad-exit=1", "--label", "trtllm-llmapi-launch"),
    ]
    assert after_python(plan, 4) == MODULE
    second = plan.processes[1].argv
    assert "--relative=2" in second
    for worker in plan.processes[:2]:
        assert worker.argv[worker.argv.index("--host") + 1] == "0.0.0.0"
        assert "CUDA_VISIBLE_DEVICES" not in worker.env
        assert "CUDA_VISIBLE_DEVICES" not in json.loads(worker.env[RANK_ENV])
        assert not worker.unset
        assert worker.num_ranks == 1
    ingress = plan.processes[-1].argv
    assert ingress[ingress.index("--advertise-host") + 1] == "head"
    assert "each worker takes 2 whole nodes" in plan.notes


def test_smaller_worker_beside_one_of_several_nodes_gets_a_node_of_its_own() -> None:
    configs = {
        Role.PREFILL: config(tensor_parallel_size=4),
        Role.DECODE: config(tensor_parallel_size=16),
    }
    settings = make_settings(engine="trtllm", disaggregated=True, kv_transport="ucx")
    plan = make_plan(settings, host(**SLURM), RunFolder(Path("/runs/abc123")), configs)
    prefill, decode = (list(one.argv) for one in plan.processes[:2])
    assert {"--nodes=1", "--ntasks-per-node=4", "--relative=0"} <= set(prefill)
    assert {"--nodes=2", "--ntasks-per-node=8", "--relative=1"} <= set(decode)
    assert "each prefill worker takes 1 whole node; 4 of 8 GPUs stay unused" in plan.notes


def test_too_few_nodes_are_told_with_the_sum() -> None:
    with pytest.raises(ConfigError, match=r"3 aggregated × 2 = 6 nodes of 8 GPUs, and .* has 4"):
        plan_of(host(**SLURM), tp=16, num_workers=3)


def test_ranks_that_fill_no_whole_nodes_are_told_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"\(12 = 1 × 8 \+ 4\); take 8 or 16 ranks"):
        plan_of(host(**SLURM), tp=12)


def test_several_nodes_without_slurm_are_told_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"a node has 8.*SLURM_JOB_ID.*salloc --nodes=2"):
        plan_of(host(), tp=16)
    with pytest.raises(ConfigError, match=r"start by srun, not by --mpi-launch spawn"):
        plan_of(host(**SLURM), tp=16, mpi_launch="spawn")


def test_gpus_per_node_that_the_operator_gives_count() -> None:
    inventory = host(**SLURM, gpus=())
    assert "--nodes=4" in plan_of(inventory, tp=16, gpus_per_node=4).processes[0].argv
    with pytest.raises(ConfigError, match="--gpus-per-node N"):
        plan_of(inventory, tp=16, mpi_launch="srun")


def test_workers_do_not_share_a_gpu_unless_the_operator_names_it() -> None:
    plan = plan_of(host(), tp=2, num_workers=4)
    assert [one.env.get("CUDA_VISIBLE_DEVICES") for one in plan.processes] == [
        *("0,1", "2,3", "4,5", "6,7"),
        None,
    ]
    with pytest.raises(ConfigError, match=r"5 workers of tensor_parallel_size 2 need 10 GPUs"):
        plan_of(host(), tp=2, num_workers=5)
    with pytest.raises(
        ConfigError, match=r"1 decode worker needs 1 GPU beside 1 prefill worker, and none is"
    ):
        plan_of(host(gpus=("0",)), disaggregated=True, kv_transport="ucx")
    shared = plan_of(
        host(gpus=("0",)),
        disaggregated=True,
        kv_transport="ucx",
        prefill_cuda_visible_devices="0",
        decode_cuda_visible_devices="0",
    )
    assert any("prefill and decode share GPU 0" in note for note in shared.notes)


AWKWARD = ["a model", "tab\there", "new\nline", "*", "[ab]", "what?", "", "back\\slash"]


@pytest.mark.parametrize("word", AWKWARD)
def test_arguments_that_would_be_split_travel_in_a_variable(word: str) -> None:
    argv = ["-m", "trtllm_workers.cli.main", "worker", "--model-path", word]
    words, env = through_llmapi_launch("/venv/bin/python", argv)
    assert words == (
        *("/venv/bin/python", "-m", "trtllm_workers.cli.main", "worker", ARGUMENTS_FLAG),
    )
    assert json.loads(env[ARGUMENTS]) == ["--model-path", word]


def test_plain_arguments_stay_on_the_command_line() -> None:
    argv = ["-m", "trtllm_workers.cli.main", "worker", "--model-path", "/models/$HOME;'\""]
    assert through_llmapi_launch("/bin/python", argv) == (("/bin/python", *argv), {})


def test_python_that_cannot_be_passed_on_is_told() -> None:
    with pytest.raises(ConfigError, match="install the environment under another path"):
        through_llmapi_launch("/my env/python", ["worker"])


def test_shell_text_of_a_world_is_what_is_started() -> None:
    plan = plan_of(host(**SLURM), tp=16, model_path=Path("/models/my model"))
    text = as_shell(plan)
    assert ARGUMENTS_FLAG in text
    assert f"{ARGUMENTS}={shlex.quote(plan.processes[0].env[ARGUMENTS])}" in text


def test_left_over_shared_memory_of_the_run_alone_is_removed(tmp_path: Path) -> None:
    mine = shm_name("abc123", "worker-1")
    others = ["moe_shared", shm_name("abc124", "worker-1"), f"x{mine}", "trtllm_launch_abc1234_w"]
    for name in [mine, f"{mine}_l3_lr0_all", shm_name("abc123", "worker-10"), *others]:
        (tmp_path / name).touch()
    assert remove_left_overs("abc123", "worker-1", tmp_path) == 2
    assert (tmp_path / shm_name("abc123", "worker-10")).exists()
    assert remove_left_overs("abc123", folder=tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_name_of_shared_memory_is_told_to_each_worker() -> None:
    plan = plan_of(host(), num_workers=2)
    names = [one.env.get(EPLB_SHM_NAME) for one in plan.processes]
    assert names == ["trtllm_launch_abc123_worker-0", "trtllm_launch_abc123_worker-1", None]
