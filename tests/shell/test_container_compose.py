"""The compose files, read as an engine's compose reads them: who starts, who may reach it, what must be set."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from tests.shell.compose import FOLDER, SECRETS, config, services
from tests.shell.containers import versions
from trtllm_workers.cli.ingress import command as ingress_command
from trtllm_workers.cli.worker import command as worker_command

VERSIONS = versions()
OURS = ["decode-0", "decode-1", "ingress", "prefill-0", "prefill-1"]
WORKERS = [name for name in OURS if name != "ingress"]
DRAIN_TIMEOUT_S = 30
WITH_GPUS = ("versions.env", "compose.yaml", "compose.gpu.yaml")


def test_images_are_those_of_versions_env(tmp_path: Path) -> None:
    found = services(tmp_path)
    assert found["etcd"]["image"] == f"{VERSIONS['ETCD_IMAGE']}:{VERSIONS['ETCD_IMAGE_TAG']}"
    assert found["nats"]["image"] == f"{VERSIONS['NATS_IMAGE']}:{VERSIONS['NATS_IMAGE_TAG']}"
    mine = f"trtllm-launch:{VERSIONS['TRTLLM_LAUNCH_VERSION']}-cpu"
    assert {found[name]["image"] for name in OURS} == {mine}
    other = services(tmp_path, TRTLLM_LAUNCH_IMAGE="mine:1")
    assert {other[name]["image"] for name in OURS} == {"mine:1"}


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_nothing_starts_without_its_secrets(tmp_path: Path, missing: str) -> None:
    given = {name: value for name, value in SECRETS.items() if name != missing}
    done = config(tmp_path, **given)
    assert done.returncode != 0
    assert f"{missing} is missing a value: set it to" in done.stderr


def test_nothing_starts_without_its_versions(tmp_path: Path) -> None:
    done = config(tmp_path, "compose.yaml", **SECRETS)
    assert done.returncode != 0
    assert "add --env-file container/versions.env" in done.stderr


def test_every_port_is_open_to_this_host_alone(tmp_path: Path) -> None:
    ports = {name: one["ports"] for name, one in services(tmp_path).items() if "ports" in one}
    assert ports == {
        "etcd": ["127.0.0.1:2379:2379"],
        "nats": ["127.0.0.1:4222:4222"],
        "ingress": ["127.0.0.1:8000:8000"],
    }
    moved = services(tmp_path, HTTP_PORT="9000")["ingress"]
    assert moved["ports"] == ["127.0.0.1:9000:8000"]
    assert "HTTP_PORT" not in moved["environment"]


def test_without_the_profile_only_etcd_and_nats_start(tmp_path: Path) -> None:
    found = services(tmp_path)
    assert sorted(found) == sorted([*OURS, "etcd", "nats"])
    assert [name for name in sorted(found) if "profiles" in found[name]] == OURS
    assert {tuple(found[name]["profiles"]) for name in OURS} == {("disagg",)}


def test_ours_wait_for_both_and_may_drain_before_they_are_killed(tmp_path: Path) -> None:
    found = services(tmp_path)
    healthy = {"condition": "service_healthy"}
    for name in OURS:
        assert found[name]["depends_on"] == {"etcd": healthy, "nats": healthy}
        grace = re.fullmatch(r"(\d+)s", found[name]["stop_grace_period"])
        assert grace is not None
        assert int(grace[1]) > DRAIN_TIMEOUT_S
        assert "init" not in found[name], "the image brings its own"
    for name in ("etcd", "nats", "ingress"):
        assert found[name]["healthcheck"]["test"][0] == "CMD"


def test_the_drain_timeout_is_the_commands_own() -> None:
    for command in (ingress_command, worker_command):
        text = command.get_help(click.Context(command, help_option_names=["-h", "--help"]))
        (default,) = re.findall(r"--drain-timeout-s.*?\[default:\s+(\d+);", text, re.DOTALL)
        assert int(default) == DRAIN_TIMEOUT_S


def test_no_container_has_more_rights_than_it_needs(tmp_path: Path) -> None:
    for name, service in services(tmp_path).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid", "ipc", "cap_add"} & set(service), name


def test_no_secret_stands_in_a_command_line(tmp_path: Path) -> None:
    for name, service in services(tmp_path).items():
        words = [*service["command"], *service.get("healthcheck", {}).get("test", [])]
        assert not [word for word in words if any(one in word for one in SECRETS.values())], name


def test_nats_gets_its_token_as_text_whatever_it_looks_like(tmp_path: Path) -> None:
    nats = services(tmp_path)["nats"]
    assert nats["environment"] == {"NATS_TOKEN": f'"{SECRETS["NATS_TOKEN"]}"'}
    assert "authorization { token: $NATS_TOKEN }" in (FOLDER / "nats.conf").read_text()


def test_with_gpus_each_worker_has_one_of_its_own_and_all_have_the_model(tmp_path: Path) -> None:
    found = services(tmp_path, *WITH_GPUS, MODEL_DIR="/models/a b")
    image = f"trtllm-launch:{VERSIONS['TRTLLM_LAUNCH_VERSION']}-trtllm"
    for name in OURS:
        assert found[name]["image"] == image
        assert found[name]["volumes"] == ["/models/a b:/model:ro"]
    devices = [found[name]["deploy"]["resources"]["reservations"]["devices"][0] for name in WORKERS]
    assert {one["driver"] for one in devices} == {"nvidia"}
    assert sorted(one["device_ids"][0] for one in devices) == ["0", "1", "2", "3"]
    for name in WORKERS:
        assert found[name]["environment"]["MODEL_PATH"] == "/model"
        assert found[name]["environment"]["CLUSTER_SECRET"] == SECRETS["CLUSTER_SECRET"]
    done = config(tmp_path, *WITH_GPUS, **SECRETS)
    assert "MODEL_DIR is missing a value: set it to the folder" in done.stderr
