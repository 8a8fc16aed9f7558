"""A bundle: the same papers make the same bytes, and no secret is among them, wherever it was planted."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest

from tests.unit.deploy.papers import facts, resolved, run_folder, with_env
from trtllm_workers.deploy import history
from trtllm_workers.deploy.bundle import write_bundle
from trtllm_workers.deploy.difference import compare
from trtllm_workers.deploy.first_error import Death
from trtllm_workers.deploy.resolved import EngineSection, Sourced
from trtllm_workers.deploy.run import ProcessRecord, RunFolder
from trtllm_workers.deploy.story import open_story
from trtllm_workers.errors import ConfigError

IN_ENVIRONMENT = "hf_PlantedInTheEnvironment0"
IN_URL = "planted/in:a-URL"
CLUSTER = "planted-cluster-secret-0123456789abcdef"
IN_PROCESS = "planted-in-a-workers-environment"
IN_YAML = "planted-in-a-YAML-file"
IN_LOG = "planted-in-a-log-line"
SECRETS = (IN_ENVIRONMENT, IN_URL, quote(IN_URL, safe=""), CLUSTER, IN_PROCESS, IN_YAML, IN_LOG)


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[member.name.partition("/")[2]] = file.read().decode()
        return found


def bundled(root: Path, run_id: str = "abc123", *, hide_user: bool = False) -> dict[str, str]:
    path = root / "bundle.tar.gz"
    environ = {"USER": "zoe", "HOME": "/home/zoe"}
    write_bundle(open_story([root], run_id), path, environ, hide_user=hide_user)
    return unpacked(path)


def plant_secrets(root: Path, config: Path, worker_pid: int, ticks: int) -> None:
    """Make a run whose every paper holds secrets, as careless writers would leave them."""
    folder, record = run_folder(root)
    (folder.discovery / "secret").write_text(CLUSTER)
    log = Path(record.processes[0].log)
    with log.open("a") as lines:
        lines.write(f"{CLUSTER} and {IN_PROCESS} and {IN_ENVIRONMENT} appear without a name\n")
        lines.write(f"Authorization: Bearer {IN_LOG}\n")
        lines.write(f"GET /v1?api_key={IN_LOG}&x=1 nats_password='{IN_LOG}' --hf-token {IN_LOG}\n")
        lines.write(
            f"connecting to nats://bob:{quote(IN_URL, safe='')}@host and nats://bob:{IN_URL}@host\n"
        )
        lines.write(f'{{"event": "x", "cluster_secret": "{IN_LOG}"}}\n')
    worker = ProcessRecord(
        name="worker-0", role="aggregated", pid=worker_pid, start_ticks=ticks, log=str(log)
    )
    folder.write(
        msgspec.structs.replace(record, processes=(worker,), discovery=f"etcd://u:{IN_URL}@h")
    )
    config.write_text(f"backend: pytorch\napi_key: {IN_YAML}\ntoken: '{IN_YAML}'\n")
    told = resolved(
        "abc123",
        settings={
            "engine_config": Sourced(str(config), "--engine-config"),
            "nats_server": Sourced(f"nats://bob:{IN_URL}@host:4222", "environment NATS_SERVER"),
            "overrides": Sourced([f"x.api_key={IN_LOG}"], "--set"),
        },
        engine_configs={
            "decode": EngineSection(engine="trtllm", settings={"hf_token": Sourced("x", "y")})
        },
    )
    folder.resolved.write_bytes(msgspec.json.encode(told))
    careless = with_env(
        facts(), HF_TOKEN=IN_ENVIRONMENT, PROXY=f"http://u:{IN_URL}@p", UCX_TLS=IN_PROCESS
    )
    (folder.facts / "worker-0.json").write_bytes(msgspec.json.encode(careless))
    status = {"step": "starting", "since": 1.0, "detail": f"token={IN_LOG} {CLUSTER}"}
    folder.status("worker-0").write_text(json.dumps(status))


def test_no_planted_secret_reaches_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_workers.deploy import proc

    monkeypatch.setenv("HF_TOKEN", IN_ENVIRONMENT)
    root, config = tmp_path / "runs", tmp_path / "agg.yaml"
    root.mkdir()
    wait = "import sys; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", wait],
        env={"WORKERS_OWN_TOKEN": IN_PROCESS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        found = proc.read(worker.pid)
        assert found is not None
        plant_secrets(root, config, worker.pid, found.start_ticks)
        papers = bundled(root)
        worker.kill()
    assert {"configs/engine_config.yaml", "status/worker-0.json", "run.json"} <= set(papers)
    whole = gzip.decompress((root / "bundle.tar.gz").read_bytes())
    for secret in SECRETS:
        assert secret.encode() not in whole, secret
    # What is no secret is still there, and what is JSON can be read.
    assert "appear without a name" in papers["logs/worker-0.log"]
    assert "backend: pytorch" in papers["configs/engine_config.yaml"]
    for name, text in papers.items():
        if name.endswith(".json"):
            json.loads(text)


def test_readme_and_first_error_come_first_and_name_what_is_there(tmp_path: Path) -> None:
    run_folder(tmp_path)
    papers = bundled(tmp_path)
    names = list(papers)
    assert names[:2] == ["README.txt", "first_error.txt"]
    assert names[2:] == sorted(names[2:])
    assert "it broke" in papers["first_error.txt"]
    for part in ("resolved.json", "facts/", "logs/", "env-audit.txt"):
        assert part in papers["README.txt"]
    assert "ended.json" not in papers["README.txt"]
    assert (tmp_path / "bundle.tar.gz").stat().st_mode & 0o777 == 0o600


def test_the_same_run_makes_the_same_bytes(tmp_path: Path) -> None:
    run_folder(tmp_path)
    bundled(tmp_path)
    first = (tmp_path / "bundle.tar.gz").read_bytes()
    bundled(tmp_path)
    assert (tmp_path / "bundle.tar.gz").read_bytes() == first


def test_an_ended_run_can_be_bundled_and_its_report_stands_on_top(tmp_path: Path) -> None:
    folder, record = run_folder(tmp_path)
    death = Death("worker-0", None, "was killed by SIGKILL (signal 9)")
    history.keep(folder, record, "failed", history.Failure("the report", death), with_logs=True)
    folder.remove()
    papers = bundled(tmp_path)
    assert "worker-0" in papers["first_error.txt"]
    assert "was killed by SIGKILL" in papers["first_error.txt"]
    assert "the report" in papers["first_error.txt"]
    assert "ended.json" in papers
    assert "run.json" not in papers


def test_a_bundle_can_be_compared_with_its_run(tmp_path: Path) -> None:
    run_folder(tmp_path)
    bundled(tmp_path)
    packed = open_story([tmp_path], str(tmp_path / "bundle.tar.gz"))
    assert packed.facts == (facts(),)
    found = compare(packed, open_story([tmp_path], "abc123"))
    assert (found.changes, found.unknown) == ([], [])
    with pytest.raises(ConfigError, match="in a bundle already"):
        write_bundle(packed, tmp_path / "again.tar.gz", {}, hide_user=False)


def test_an_anonymous_bundle_names_no_user(tmp_path: Path) -> None:
    _, record = run_folder(tmp_path)
    with Path(record.processes[0].log).open("a") as log:
        log.write("loading /home/zoe/models for zoe@node1\n")
    assert "zoe" in bundled(tmp_path)["logs/worker-0.log"]
    assert not any("zoe" in text for text in bundled(tmp_path, hide_user=True).values())


def test_long_logs_are_cut_in_the_middle(tmp_path: Path) -> None:
    _, record = run_folder(tmp_path)
    Path(record.processes[0].log).write_text("x" * 100 + "\n" + "y" * 79 + "\n" * 400_000)
    assert len(bundled(tmp_path)["logs/worker-0.log"]) < 400_000


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no tar")])
def test_a_file_that_is_no_bundle_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="bundle"):
        open_story([tmp_path], str(path))
    with pytest.raises(ConfigError, match="there is no file"):
        open_story([tmp_path], str(tmp_path / "nowhere.tar.gz"))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    run_folder(tmp_path)
    with pytest.raises(ConfigError, match="choose another place with -o"):
        write_bundle(
            open_story([tmp_path], None), tmp_path / "no" / "where.tar.gz", {}, hide_user=False
        )


def test_the_facts_of_a_folder_may_be_read_by_its_path(tmp_path: Path) -> None:
    folder, _ = run_folder(tmp_path)
    assert open_story([], f"{folder.path}").run_id == "abc123"
    assert RunFolder(folder.path).read() is not None
