"""What stays of ended runs: enough to compare them, never a secret, never without bound."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.deploy.papers import ended, facts, run_folder
from trtllm_workers.deploy import history
from trtllm_workers.deploy.first_error import Death
from trtllm_workers.deploy.run import find_runs
from trtllm_workers.deploy.story import open_story
from trtllm_workers.errors import ConfigError


def test_an_ended_run_keeps_its_papers_for_its_owner_alone(tmp_path: Path) -> None:
    folder, record = run_folder(tmp_path)
    failure = history.Failure("worker-0 died", Death("worker-0", None, "ended with exit code 4"))
    place = history.keep(folder, record, "failed", failure, with_logs=True)
    assert place == tmp_path / "history" / "abc123"
    folder.remove()
    kept = sorted(str(one.relative_to(place)) for one in place.rglob("*") if one.is_file())
    assert kept == [
        "ended.json",
        "facts/worker-0.json",
        "first_error.txt",
        "logs/worker-0.log",
        "resolved.json",
    ]
    assert place.stat().st_mode & 0o777 == 0o700
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert "it broke" in (place / "first_error.txt").read_text()
    told = open_story([tmp_path], "abc123")
    assert told.ended is not None
    assert (told.ended.outcome, told.ended.process) == ("failed", "worker-0")
    assert told.facts == (facts(),)
    assert find_runs([tmp_path], elsewhere=False) == []


def test_a_run_that_ended_well_keeps_no_logs_and_is_kept_once(tmp_path: Path) -> None:
    folder, record = run_folder(tmp_path)
    place = history.keep(folder, record, "stopped")
    assert place is not None
    assert not (place / "logs").exists()
    assert history.keep(folder, record, "launcher died", with_logs=True) == place
    assert not (place / "logs").exists()


def test_logs_lose_secrets_that_the_launcher_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "very-secret-value")
    folder, record = run_folder(tmp_path)
    (folder.discovery / "secret").write_text("the-cluster-secret-of-32-characters")
    with Path(record.processes[0].log).open("a") as log:
        log.write("used very-secret-value and the-cluster-secret-of-32-characters\n")
    place = history.keep(folder, record, "failed", with_logs=True)
    assert place is not None
    text = "".join(one.read_text() for one in place.rglob("*") if one.is_file())
    assert "used [redacted] and [redacted]" in text
    assert "very-secret-value" not in text
    assert "the-cluster-secret" not in text


def test_only_the_latest_runs_stay(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / "history" / f"run{number}"
        ended(path, path.name)
        (path / "big").write_bytes(b"x" * 1000)
        os.utime(path, (number, number))
    history.prune(tmp_path / "history", kept_runs=4)
    assert [one.name for one in history.past_runs([tmp_path])] == ["run4", "run3", "run2", "run1"]
    history.prune(tmp_path / "history", max_bytes=2600)
    assert [one.name for one in history.past_runs([tmp_path])] == ["run4", "run3"]
    history.prune(tmp_path / "history", max_bytes=0)
    assert [one.name for one in history.past_runs([tmp_path])] == ["run4"]


def test_a_long_log_keeps_its_beginning_and_its_end_in_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "long.log"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    text = history.head_and_tail(path, 100, 100)
    assert text is not None
    first, *_, last = text.splitlines()
    assert (first, last) == ("line 0", "line 999")
    assert "bytes left out" in text
    assert len(text) < 300
    assert history.head_and_tail(tmp_path / "nowhere", 1, 1) is None


def test_a_place_that_cannot_be_written_does_not_keep_a_run_from_ending(tmp_path: Path) -> None:
    folder, record = run_folder(tmp_path)
    (tmp_path / "history").write_text("in the way")
    assert history.keep(folder, record, "stopped") is None


def test_the_latest_run_is_meant_when_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is there, and none is remembered"):
        open_story([tmp_path], None)
    ended(tmp_path / "history" / "old111", "old111")
    assert open_story([tmp_path], None).run_id == "old111"
    run_folder(tmp_path, "new222", host="another-host")
    assert open_story([tmp_path], None).run_id == "new222"
    assert open_story([tmp_path], "old").run_id == "old111"
    with pytest.raises(ConfigError, match="unknown run 'old112'; did you mean old111"):
        open_story([tmp_path], "old112")
    with pytest.raises(ConfigError, match="is no folder of a run"):
        open_story([tmp_path], f"{tmp_path}/history")


def test_logs_of_ranks_beside_that_of_their_step_are_kept(tmp_path: Path) -> None:
    _, record = run_folder(tmp_path)
    log = Path(record.processes[-1].log)
    log.with_name(f"{log.stem}.rank1.log").write_text("a line of rank 1\n")
    texts = history.log_texts(record, 1 << 20)
    assert texts[f"{record.processes[-1].name}.rank1"] == "a line of rank 1\n"
