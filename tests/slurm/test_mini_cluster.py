"""The cluster that the other tests here stand on is a real one."""

from __future__ import annotations

import subprocess

import pytest

from tests.slurm.cluster import MiniCluster


def test_a_step_runs_on_every_node_it_asked_for(mini_cluster: MiniCluster) -> None:
    done = mini_cluster.run(["srun", "--nodes=2", "--ntasks-per-node=2", "hostname"])
    assert sorted(done.stdout.split()) == ["sn1", "sn1", "sn2", "sn2"], done.stderr


def test_a_node_has_its_own_name_and_address(mini_cluster: MiniCluster) -> None:
    done = mini_cluster.exec("sn3", ["sh", "-c", "hostname; hostname -i"])
    assert done.stdout.split() == ["sn3", "10.77.0.13"]


def test_steps_get_the_options_of_pyxis(mini_cluster: MiniCluster) -> None:
    done = mini_cluster.run(
        ["srun", "--container-image=there/is:one", "printenv", "MSL_CONTAINER_IMAGE"]
    )
    assert done.stdout.strip() == "there/is:one", done.stderr


def test_a_command_past_its_deadline_is_ended_inside_the_node(mini_cluster: MiniCluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        mini_cluster.exec("sn1", ["sleep", "3731"], timeout_s=1.0)
    left = mini_cluster.exec("sn1", ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"])
    assert "slurmd" in left.stdout
    assert "sleep 3731" not in left.stdout


def test_a_killed_node_is_lost_and_comes_back_when_started(mini_cluster: MiniCluster) -> None:
    asks_its_slurmd = ["timeout", "1", "bash", "-c", "exec 3<>/dev/tcp/10.77.0.14/16818"]
    assert mini_cluster.exec("sn1", asks_its_slurmd).returncode == 0
    mini_cluster.kill_node("sn4")
    try:
        assert mini_cluster.exec("sn4", ["true"]).returncode != 0
        assert mini_cluster.exec("sn1", asks_its_slurmd).returncode != 0
    finally:
        mini_cluster.start_node("sn4")
    done = mini_cluster.run(["srun", "--nodelist=sn4", "hostname"])
    assert done.stdout.strip() == "sn4", done.stderr
