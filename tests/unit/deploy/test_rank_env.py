"""Ranks of one worker compare their environments before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_workers.cli.world import rank_in_world
from trtllm_workers.config.env import RANK_ENV, apply_rank_environment
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy.inventory import mpiexec_path
from trtllm_workers.engines.trtllm.ranks import run_follower
from trtllm_workers.errors import ConfigError
from trtllm_workers.worker import rank_env
from trtllm_workers.worker.rank_env import difference, is_secret, rank_variables

JOIN = """
import sys
from trtllm_workers.config.env import environment
from trtllm_workers.errors import LaunchError
from trtllm_workers.worker.rank_env import join_world
try:
    print("joined as", join_world(environment(), int(sys.argv[1]), float(sys.argv[2])), flush=True)
except LaunchError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_variables_that_differ_by_rank_or_are_the_launchers_own_do_not_count() -> None:
    environ = {
        "UCX_TLS": "rc",
        "NCCL_DEBUG": "INFO",
        "OMPI_MCA_btl": "self",
        "LD_LIBRARY_PATH": "/lib",
        "PMI_RANK": "1",
        "OMPI_COMM_WORLD_RANK": "1",
        "SLURM_PROCID": "1",
        "OMPI_MCA_ess_base_vpid": "1",
        "OMPI_MCA_orte_ess_num_procs": "2",
        "TRTLLM_LAUNCH_RUN_ID": "abc123",
        "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY": "00ff",
        "HOME": "/root",
    }
    assert list(rank_variables(environ)) == [
        *("LD_LIBRARY_PATH", "NCCL_DEBUG", "OMPI_MCA_btl", "UCX_TLS"),
    ]


def test_secrets_are_known_by_their_names() -> None:
    assert [is_secret(name) for name in ("HF_TOKEN", "TRTLLM_API_KEY", "TLLM_SECRET")] == [True] * 3
    assert not any(is_secret(name) for name in ("UCX_TLS", "HF_HOME", "NCCL_KEYED", "TOKENIZERS"))


def test_difference_names_variables_values_and_ranks_but_no_secret() -> None:
    everyone = [
        {"UCX_TLS": "tcp", "HF_TOKEN": "hf_abc", "HF_HOME": "/hub"},
        {"UCX_TLS": "tcp", "HF_TOKEN": "hf_xyz", "HF_HOME": "/hub"},
        {"HF_TOKEN": "hf_abc", "HF_HOME": "/hub"},
    ]
    text = difference(everyone)
    assert text.splitlines() == [
        "HF_TOKEN: another value (not shown) on ranks 0, 2; another value (not shown) on rank 1",
        "UCX_TLS: 'tcp' on ranks 0, 1; not set on rank 2",
    ]
    assert difference(everyone[:1] * 3) == ""


def test_what_the_launcher_decided_is_set_over_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv(RANK_ENV, '{"UCX_TLS": "rc"}')
    environ = apply_rank_environment()
    assert (environ["UCX_TLS"], environ["NCCL_DEBUG"]) == ("rc", "INFO")
    monkeypatch.setenv(RANK_ENV, "{")
    with pytest.raises(ConfigError, match=RANK_ENV):
        apply_rank_environment()


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TRTLLM_LAUNCH_WORLD_SIZE": "2"}, 2),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 4),
        ({"PMI_SIZE": "4"}, 4),
    ],
    ids=["alone", "mpirun -n 1", "by up", "wrong by hand", "right by hand"],
)
def test_worker_joins_a_world_where_something_started_several_ranks(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], size: int | None
) -> None:
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "TRTLLM_LAUNCH_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    joined: list[int] = []

    def join_world(_environ: object, size: int) -> int:
        joined.append(size)
        return 1

    monkeypatch.setattr(rank_env, "join_world", join_world)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    config = EngineConfig("trtllm", {key: Setting(one, "a") for key, one in sizes.items()})
    assert rank_in_world(config) == (0 if size is None else 1)
    assert joined == ([] if size is None else [size])


def test_follower_runs_the_loop_of_tensorrt_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt_llm" / "llmapi"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    done = tmp_path / "done"
    (package / "mgmn_worker_node.py").write_text(
        f"import pathlib\npathlib.Path({str(done)!r}).write_text(__name__)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        run_follower()
    finally:
        # Not monkeypatch.delitem: it puts back what it removed when the test ends.
        for name in ("tensorrt_llm.llmapi", "tensorrt_llm"):
            sys.modules.pop(name, None)
    assert done.read_text() == "__main__"


@pytest.fixture
def mpiexec() -> str:
    path = mpiexec_path()
    if not path:
        pytest.skip("no mpiexec beside the interpreter: pip install 'trtllm-launch[mpi]'")
    return path


def world(
    mpiexec: str, size: str, *ranks: tuple[str, str], deadline_s: str = "20"
) -> subprocess.CompletedProcess[str]:
    """Start one rank for each (variable, value)."""
    words = [mpiexec, "-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1"]
    for index, (name, value) in enumerate(ranks):
        words += [":"] if index else []
        words += ["-n", "1", "-env", name, value, sys.executable, "-m", "mpi4py", "-c", JOIN]
        words += [size, deadline_s]
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=25)


@pytest.mark.e2e
def test_ranks_that_see_the_same_join(mpiexec: str) -> None:
    done = world(mpiexec, "2", ("UCX_TLS", "tcp,self"), ("UCX_TLS", "tcp,self"))
    assert done.returncode == 0, done.stderr
    assert {"joined as 0", "joined as 1"} <= set(done.stdout.splitlines())


@pytest.mark.e2e
def test_ranks_that_see_another_transport_are_told_which_and_where(mpiexec: str) -> None:
    before = set(Path("/dev/shm").glob("mpich_shm_*"))
    done = world(mpiexec, "2", ("UCX_TLS", "tcp,self"), ("UCX_TLS", "all"))
    assert done.returncode != 0
    assert not set(Path("/dev/shm").glob("mpich_shm_*")) - before, "MPI's memory has no name"
    assert "joined" not in done.stdout
    assert "UCX_TLS: 'tcp,self' on rank 0; 'all' on rank 1" in done.stdout
    assert "the 2 ranks of this worker see different environments" in done.stdout


@pytest.mark.e2e
def test_secret_that_differs_is_named_and_not_shown(mpiexec: str) -> None:
    done = world(mpiexec, "2", ("HF_TOKEN", "hf_abc"), ("HF_TOKEN", "hf_xyz"))
    assert done.returncode != 0
    assert "HF_TOKEN: another value (not shown) on rank 0" in done.stdout
    assert "hf_abc" not in done.stdout + done.stderr


@pytest.mark.e2e
def test_world_of_another_size_than_planned_is_told(mpiexec: str) -> None:
    done = world(mpiexec, "4", ("UCX_TLS", "all"), ("UCX_TLS", "all"))
    assert done.returncode != 0
    assert "4 ranks were started as one worker, but this process is in an MPI world of 2" in (
        done.stdout
    )
