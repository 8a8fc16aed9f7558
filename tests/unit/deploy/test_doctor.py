"""Doctor's findings: each answer is a line, and only what is needed makes it fail."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from trtllm_workers.deploy import doctor
from trtllm_workers.deploy.ask import ask
from trtllm_workers.deploy.findings import Finding, as_text, note, ok, problem
from trtllm_workers.deploy.run import Run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


TORCH_SAYS = '{"version": "2.9.0", "threads": 8, "device": "cpu", "cuda": null}'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer for torch, whose import takes seconds."""
    monkeypatch.setattr(doctor, "_ask", lambda *_args, **_more: (TORCH_SAYS,))


def findings_of(model: Path, runs: tuple[Run, ...] = (), **flags: object) -> dict[str, Finding]:
    given = {"model_path": str(model), "engine": "sim", "http_port": 0, **flags}
    found = doctor.examine(given, {"HOME": str(model)}, runs)
    return {one.subject: one for one in found}


def test_doctor_finds_this_environment_in_order(model: Path) -> None:
    findings = findings_of(model)
    for subject in ("system", "python", "packages", "settings", "memory", "port", "runs"):
        assert findings[subject].level == "ok", findings[subject]
    assert "engine sim" in findings["settings"].text


@pytest.mark.usefixtures("quick")
def test_doctor_turns_a_wrong_setting_into_a_problem(tmp_path: Path, model: Path) -> None:
    wrong = findings_of(tmp_path / "nothing")["settings"]
    assert wrong.level == "problem"
    assert "there is no folder" in wrong.text
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert findings_of(model, http_port=port)["port"].level == "problem"


@pytest.mark.usefixtures("quick")
def test_doctor_names_left_over_runs_and_how_to_end_them(model: Path) -> None:
    stale = findings_of(model, runs=(Run("abc123", None, None),))["runs"]
    assert (stale.level, stale.fix) == ("note", "trtllm-launch stop abc123")


@pytest.mark.usefixtures("quick")
def test_missing_torch_is_a_problem_only_for_the_engine_that_needs_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = doctor._has_module
    monkeypatch.setattr(doctor, "_has_module", lambda name: name != "torch" and present(name))
    assert findings_of(model)["torch"].level == "note"
    assert findings_of(model, engine="torch")["torch"].level == "problem"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("subject", "module", "flags"),
    [
        ("UCX", "ucxx", {"disaggregated": True}),
        ("NIXL", "nixl_cu12", {"disaggregated": True, "kv_transport": "nixl"}),
        ("MPI", "mpi4py", {"engine": "torch", "overrides": ("tensor_parallel_size=2",)}),
    ],
)
def test_missing_extra_is_a_problem_only_for_a_run_that_needs_it(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    subject: str,
    module: str,
    flags: dict[str, object],
) -> None:
    present = doctor._has_module
    monkeypatch.setattr(doctor, "_has_module", lambda name: name != module and present(name))
    monkeypatch.setattr(doctor, "mpiexec_path", lambda: "/venv/bin/mpiexec")
    unneeded, needed = findings_of(model)[subject], findings_of(model, (), **flags)[subject]
    assert (unneeded.level, needed.level) == ("note", "problem")
    assert needed.text.startswith(f"missing: {module}; for ")
    assert needed.fix == f"pip install 'trtllm-launch[{subject.lower()}]'"


def test_mpi_without_mpiexec_is_missing_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask", lambda *_args, **_more: (TORCH_SAYS,))
    monkeypatch.setattr(doctor, "_has_module", lambda _name: True)
    monkeypatch.setattr(doctor, "mpiexec_path", lambda: "")
    assert findings_of(model)["MPI"].text.startswith("missing: mpiexec")


def test_extra_that_does_not_import_says_why(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_module", lambda _name: True)
    monkeypatch.setattr(doctor, "_ask", lambda *_args, **_more: "libucp.so.0: no such file")
    found = findings_of(model, disaggregated=True)["UCX"]
    assert (found.level, found.text) == (
        "problem",
        "ucxx does not import: libucp.so.0: no such file",
    )


def test_every_finding_has_a_section_and_the_shape_that_is_documented(model: Path) -> None:
    found = findings_of(model)
    assert {name: one.section for name, one in found.items() if one.section == "engine"} == {}
    assert {one.section for one in found.values()} >= {"host", "ports", "runs", "services", "slurm"}
    assert set(msgspec.to_builtins(found["port"])) == {"level", "subject", "text", "fix", "section"}


def test_broken_program_is_a_line_and_not_a_hang() -> None:
    assert ask(["/no/such/program"]) == "No such file or directory"
    assert ask(["sh", "-c", "echo no driver >&2; exit 3"]) == "no driver"
    assert ask(["sh", "-c", "read line < /dev/zero"], timeout_s=0.2) == ("no answer within 0 s")


def test_text_has_a_line_per_finding_fixes_below_and_a_verdict() -> None:
    text = as_text(
        [ok("python", "3.11"), note("gpu", "none"), problem("torch", "missing", "make setup")]
    )
    assert text.splitlines() == [
        "ok       python  3.11",
        "note     gpu     none",
        "problem  torch   missing",
        "           → make setup",
        "",
        "1 problem to solve first",
    ]
    assert as_text([ok("python", "3.11")]).endswith("everything that is needed is here")


@pytest.mark.usefixtures("quick")
def test_packages_for_images_are_missed_only_by_a_model_that_takes_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "vision_lacks", lambda _engine: ("pillow",))
    assert findings_of(model)["images"].level == "note"
    (model / "config.json").write_text('{"vision_config": {}}')
    found = findings_of(model)["images"]
    assert (found.level, found.fix) == ("problem", "pip install 'trtllm-launch[vision]'")
    assert findings_of(model, modality="text")["images"].level == "note"


@pytest.mark.usefixtures("quick")
def test_what_requests_may_name_is_shown(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"vision_config": {}}')
    found = findings_of(model)["images"]
    assert found.level == "ok"
    assert found.text.endswith("; no local files, URLs of any public address")
    flags = {"allowed_local_media_path": str(tmp_path), "media_url_host": ("a.example", "b:80")}
    opened = findings_of(model, (), **flags)["images"].text
    assert opened.endswith(f"; local files under {tmp_path}, URLs of a.example, b:80")
