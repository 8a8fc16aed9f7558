"""Whether TensorRT-LLM can run here: every cause is a line, the most basic one first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy import trtllm_facts
from trtllm_workers.deploy.findings import Finding
from trtllm_workers.deploy.trtllm_facts import find_facts, parse_devices, trtllm_version
from trtllm_workers.deploy.trtllm_host import (
    Device,
    Facts,
    choose_engine,
    judge,
    require_trtllm,
)
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

DIST_INFO = Path(__file__).resolve().parents[2] / "fakes" / "dist_info"
H200 = Device("590.44", 9.0, 143771)
CONTAINER = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
INDEX = "https://pypi.nvidia.com"


def facts_of(**changes: Any) -> Facts:
    """Return a host where everything is as it should be, but for ``changes``."""
    good: dict[str, Any] = {
        "version": "1.2.1",
        "gpus": ("0", "1"),
        "devices": (H200, H200),
        "mpirun": "/usr/bin/mpirun",
        "mpi_flavour": "openmpi",
    }
    return Facts(**good | changes)


def config_of(**sizes: Any) -> EngineConfig:
    given = {name.replace("__", "."): Setting(value, "a.yaml:1") for name, value in sizes.items()}
    return EngineConfig("trtllm", given)


def both(prefill: EngineConfig, decode: EngineConfig) -> Mapping[Role, EngineConfig]:
    return {Role.PREFILL: prefill, Role.DECODE: decode}


def findings(
    facts: Facts, configs: Mapping[Role, EngineConfig] | None = None, **settings: Any
) -> dict[str, Finding]:
    made = make_settings(engine="trtllm", **settings)
    found = judge(made, {Role.AGGREGATED: config_of()} if configs is None else configs, facts)
    assert len({one.subject for one in found}) == len(found), "a subject stands for one line"
    return {one.subject: one for one in found}


def refused(facts: Facts, *, tp: int = 1, **settings: Any) -> list[str]:
    configs = {Role.AGGREGATED: config_of(tensor_parallel_size=tp)}
    with pytest.raises(ConfigError) as caught:
        require_trtllm(make_settings(engine="trtllm", **settings), configs, facts)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def accepted(facts: Facts, *, tp: int = 1, **settings: Any) -> None:
    configs = {Role.AGGREGATED: config_of(tensor_parallel_size=tp)}
    require_trtllm(make_settings(engine="trtllm", **settings), configs, facts)


# --- the package --------------------------------------------------------------------------------


def test_a_good_host_has_nothing_to_mend() -> None:
    accepted(facts_of(), tp=2)
    assert {one.level for one in findings(facts_of()).values()} == {"ok"}


def test_a_missing_package_is_told_first_and_says_where_it_comes_from() -> None:
    lines = refused(facts_of(version=None, gpus=(), devices=()))
    assert lines[0].startswith("TensorRT-LLM is not installed; ")
    assert CONTAINER in lines[0]
    assert f"pip install tensorrt-llm==1.2.1 --extra-index-url {INDEX}" in lines[0]
    assert any("no GPU is visible" in line for line in lines[1:]), "all causes are told at once"


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("1.2.0", "#12770"),
        ("1.2.0rc6", "#12770"),
        ("1.1.0", "too old"),
        ("1.0", "too old"),
        ("0.21.0", "too old"),
    ],
)
def test_a_version_that_is_refused_says_why(version: str, why: str) -> None:
    (line,) = refused(facts_of(version=version))
    assert f"TensorRT-LLM {version} " in line
    assert why in line
    assert CONTAINER in line


@pytest.mark.parametrize("version", ["1.2.2", "1.3.0", "1.3.0rc5", "2.0"])
def test_a_newer_version_is_taken_and_its_keys_are_checked_against_a_known_one(
    version: str,
) -> None:
    accepted(facts_of(version=version))
    found = findings(facts_of(version=version))["TensorRT-LLM"]
    assert found.level == "note"
    assert found.text.startswith(version)
    assert "keys of 1.2.1" in found.text


def test_a_package_that_does_not_tell_its_version_is_taken() -> None:
    accepted(facts_of(version=""))
    assert findings(facts_of(version=""))["TensorRT-LLM"].level == "note"


@pytest.mark.parametrize(
    ("version", "level"), [("1.2.1", "note"), (None, "problem")], ids=["installed", "missing"]
)
def test_a_python_without_wheels_matters_while_the_package_is_to_be_installed(
    version: str | None, level: str
) -> None:
    found = findings(facts_of(version=version, python=(3, 11)))["python of TensorRT-LLM"]
    assert found.level == level
    assert "Python 3.11" in found.text


def test_what_the_packages_metadata_asks_for_is_shown_shortened() -> None:
    unmet = tuple(f"package-{number}" for number in range(6))
    found = findings(facts_of(unmet=unmet))["packages of TensorRT-LLM"]
    assert found.level == "note"
    assert "package-3 and 2 more" in found.text
    assert "package-4" not in found.text


def test_our_own_ucx_beside_tensorrt_llm_is_told_by_name() -> None:
    found = findings(facts_of(own_ucx=("ucxx-cu12", "libucx-cu12")))["UCX of TensorRT-LLM"]
    assert (found.level, found.fix) == ("note", "pip uninstall ucxx-cu12 libucx-cu12")


# --- GPUs and their driver ----------------------------------------------------------------------


def test_no_gpu_says_how_one_becomes_visible() -> None:
    (line,) = refused(facts_of(gpus=(), devices=()))
    assert "no GPU is visible" in line
    assert "docker run --gpus all" in line
    (line,) = refused(facts_of(gpus=(), cuda_visible=""))
    assert "CUDA_VISIBLE_DEVICES is ''" in line


@pytest.mark.parametrize(
    ("tp", "settings", "said"),
    [
        (4, {}, "tensor_parallel_size 4 needs 4 GPUs, and 2 are visible"),
        (2, {"num_workers": 2}, "2 workers of tensor_parallel_size 2 need 4 GPUs"),
        (1, {"num_workers": 3}, "3 workers need 3 GPUs, and 2 are visible"),
    ],
)
def test_too_few_gpus_show_the_sum(tp: int, settings: dict[str, Any], said: str) -> None:
    (line,) = refused(facts_of(), tp=tp, **settings)
    assert line.startswith(said)


def test_as_many_gpus_as_ranks_are_enough() -> None:
    accepted(facts_of(), tp=2)
    accepted(facts_of(), num_workers=2)


def test_the_roles_of_a_disaggregated_run_are_added_up() -> None:
    configs = both(config_of(), config_of(tensor_parallel_size=2))
    found = findings(facts_of(), configs, disaggregated=True)["gpus"]
    assert found.level == "problem"
    assert (
        "1 prefill worker and 1 decode worker of tensor_parallel_size 2 need 3 GPUs" in found.text
    )


def test_gpus_that_a_role_was_given_are_not_the_other_roles() -> None:
    configs = both(config_of(), config_of(tensor_parallel_size=2))
    given = {"disaggregated": True, "prefill_cuda_visible_devices": "0"}
    assert "1 is left" in findings(facts_of(), configs, **given)["gpus"].text
    three = facts_of(gpus=("0", "1", "2"))
    assert findings(three, configs, **given)["gpus"].level == "ok"


@pytest.mark.parametrize(
    ("settings", "in_slurm_job"),
    [({}, True), ({"mpi_launch": "srun"}, True), ({"mpi_cmd": "ssh node"}, False)],
)
def test_gpus_of_other_nodes_are_not_looked_for_here(
    settings: dict[str, Any], in_slurm_job: bool
) -> None:
    accepted(facts_of(in_slurm_job=in_slurm_job), tp=4, **settings)


def test_an_old_driver_is_refused_with_the_one_that_cuda_needs() -> None:
    (line,) = refused(facts_of(devices=(Device("570.86.15", 9.0, 81559),)))
    assert "driver is 570.86.15" in line
    assert "CUDA 13: 580 or newer" in line
    accepted(facts_of(devices=(Device("580.65.06", 9.0, 81559),)))


def test_an_old_driver_under_cudas_compatibility_libraries_is_a_note() -> None:
    facts = facts_of(devices=(Device("570.86.15", 9.0, 81559),), has_cuda_compat=True)
    accepted(facts)
    assert findings(facts)["driver"].level == "note"


def test_a_gpu_that_cuda_13_has_no_code_for_is_refused() -> None:
    (line,) = refused(facts_of(devices=(H200, Device("590.44", 7.0, 16384))))
    assert "compute capability 7.0" in line


def test_a_driver_that_does_not_answer_is_a_note() -> None:
    facts = facts_of(devices=(), smi_fault="no answer within 15 s")
    accepted(facts)
    assert "no answer within 15 s" in findings(facts)["driver"].text


def test_lines_stand_in_the_order_of_causes() -> None:
    old = Device("535.1", 9.0, 81559)
    lines = refused(facts_of(version="1.2.0", gpus=("0",), devices=(old,)), tp=2)
    assert ["refused" in lines[0], "GPUs" in lines[1], "driver" in lines[2]] == [True] * 3


# --- what several processes need ----------------------------------------------------------------


def test_small_limits_are_told_only_where_processes_exchange() -> None:
    facts = facts_of(shm_bytes=64 << 20, memlock_bytes=8 << 20)
    assert not {"shared memory", "memlock"} & set(findings(facts))
    several = findings(facts, {Role.AGGREGATED: config_of(tensor_parallel_size=2)})
    assert several["shared memory"].level == several["memlock"].level == "note"
    assert "8 MiB" in several["memlock"].text
    roomy = facts_of(shm_bytes=10 << 30, memlock_bytes=None)
    assert not {"shared memory", "memlock"} & set(
        findings(roomy, {Role.AGGREGATED: config_of(tensor_parallel_size=2)})
    )


@pytest.mark.parametrize(
    ("tp", "facts", "level", "said"),
    [
        (2, {}, "ok", "Open MPI (/usr/bin/mpirun)"),
        (2, {"mpi_flavour": "mpich"}, "ok", "MPICH"),
        (2, {"mpirun": "", "mpi_flavour": ""}, "note", "no mpirun on PATH"),
        (2, {"mpi_flavour": ""}, "note", "neither Open MPI's nor MPICH's"),
        (1, {"mpirun": "", "mpi_flavour": ""}, "ok", "needs none"),
    ],
)
def test_the_mpi_program_is_named(tp: int, facts: dict[str, str], level: str, said: str) -> None:
    configs = {Role.AGGREGATED: config_of(tensor_parallel_size=tp)}
    found = findings(facts_of(**facts), configs)["mpirun"]
    assert found.level == level
    assert said in found.text


def test_the_transport_of_each_role_is_told_with_its_source() -> None:
    config = config_of(cache_transceiver_config__backend="UCX")
    found = findings(facts_of(), both(config, config), disaggregated=True)["KV transport"]
    assert found.text.count("UCX (a.yaml:1) for ") == 2
    assert "KV transport" not in findings(facts_of())


# --- ENGINE=auto --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "engine", "why"),
    [
        ({"version": None}, "torch", "TensorRT-LLM is not installed"),
        ({"version": "1.2.0"}, "torch", "1.2.0 is refused"),
        ({"version": "1.1.0"}, "torch", "too old"),
        ({"gpus": ()}, "torch", "no GPU is visible"),
        ({}, "trtllm", "TensorRT-LLM 1.2.1 and a GPU are here"),
        ({"version": "1.3.0"}, "trtllm", "TensorRT-LLM 1.3.0"),
    ],
)
def test_auto_takes_trtllm_only_where_it_can_run(
    changes: dict[str, Any], engine: str, why: str
) -> None:
    chosen, reason = choose_engine(facts_of(**changes))
    assert chosen == engine
    assert why in reason


# --- the facts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2.0", "1.2.1"])
def test_the_version_is_read_from_metadata(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST_INFO / version)
    assert trtllm_version() == version


def test_a_package_without_metadata_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_llm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert trtllm_version() is None, "a mere folder is no package"
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert trtllm_version() == ""


@pytest.mark.parametrize(("version", "num_asked"), [(None, 0), ("1.2.1", 1)])
def test_the_driver_is_asked_only_where_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, num_asked: int
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho asked >> \"$0.calls\"\necho '590.44, 9.0, 143771'\n")
    program.chmod(0o755)
    monkeypatch.setattr(trtllm_facts, "trtllm_version", lambda: version)
    here = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "7"}
    facts = find_facts(here)
    calls = tmp_path / "nvidia-smi.calls"
    assert (calls.read_text().count("asked") if calls.exists() else 0) == num_asked
    assert facts.devices == (Device("590.44", 9.0, 143771),) * num_asked
    assert (facts.gpus, facts.in_slurm_job) == (("0", "1"), True)


def test_nvidia_smis_answer_is_read_line_by_line() -> None:
    said = "590.44.01, 9.0, 143771\n590.44.01, [N/A], [N/A]\nFailed to initialize NVML\n"
    assert parse_devices(said) == (Device("590.44.01", 9.0, 143771), Device("590.44.01"))


def test_nvidia_smi_that_fails_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch' >&2\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setattr(trtllm_facts, "trtllm_version", lambda: "1.2.1")
    facts = find_facts({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"})
    assert (facts.devices, facts.smi_fault) == ((), "Driver/library version mismatch")


def test_requirements_that_this_environment_breaks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").touch()
    info = tmp_path / "tensorrt_llm-1.2.1.dist-info"
    info.mkdir()
    wants = ("click<1", "click>=1", "no-such-package", 'other; extra == "devel"')
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: 1.2.1\n"
        + "".join(f"Requires-Dist: {one}\n" for one in wants)
    )
    monkeypatch.syspath_prepend(tmp_path)
    unmet = find_facts({"PATH": str(tmp_path)}, thorough=True).unmet
    assert len(unmet) == 2
    assert unmet[0].startswith("click<1 (here ")
    assert unmet[1] == "no-such-package (missing)"
