"""The first error of the first failing rank, from logs alone and from what the launcher saw."""

from __future__ import annotations

import json

from trtllm_workers.deploy.first_error import Death, as_text, first_error

KILLED = "was killed by SIGKILL (signal 9): somebody killed it"


def test_without_death_and_error_there_is_none() -> None:
    logs = {"worker-0": ["10:00:00.000 info    worker-0  registered  model=demo"], "ingress": []}
    assert first_error(logs) is None
    assert "no process died" in as_text(None)


def test_the_earliest_error_counts_not_the_first_file() -> None:
    logs = {
        "decode-0": ["10:00:02.000 error   decode-0  peer lost  peer=prefill-0"],
        "prefill-0": [
            "10:00:01.000 info    prefill-0  step",
            "10:00:01.500 error   prefill-0  out of blocks",
        ],
    }
    found = first_error(logs)
    assert found is not None
    assert (found.who, found.line) == ("prefill-0", 2)


def test_a_traceback_counts_with_the_time_of_the_line_before() -> None:
    logs = {
        "a": ["10:00:05.000 error   a  late"],
        "b": [
            "10:00:04.000 info    b  working",
            "Traceback (most recent call last):",
            '  File "x.py", line 1',
            "ValueError: broken",
        ],
    }
    found = first_error(logs)
    assert found is not None
    assert (found.process, found.line) == ("b", 2)
    assert "ValueError: broken" in found.lines


def test_midnight_between_lines_is_no_journey_back() -> None:
    began_s = 1_700_000_000 // 86400 * 86400 + 86390.0  # ten seconds before midnight
    logs = {
        "a": ["23:59:55.000 info    a  x", "00:00:10.000 error   a  second"],
        "b": ["23:59:56.000 error   b  first"],
    }
    found = first_error(logs, began_s)
    assert found is not None
    assert found.process == "b"
    assert found.time_s == began_s + 6


def test_the_death_that_the_launcher_saw_wins_over_what_others_say_of_it() -> None:
    logs = {
        "ingress": ["10:00:01.000 error   ingress  worker lost  worker=worker-0"],
        "worker-0": ["10:00:00.000 info    worker-0  registered"],
    }
    found = first_error(logs, died=Death("worker-0", None, KILLED))
    assert found is not None
    assert (found.who, found.told) == ("worker-0", False)
    assert "said nothing of an error" in as_text(found)
    assert "registered" in as_text(found)


def test_of_several_ranks_the_lines_of_the_one_that_died_count() -> None:
    logs = {
        "worker-0": [
            "10:00:00.000 error   worker-0 rank 0  a neighbour is gone",
            "10:00:00.100 critical worker-0 rank 1  CUDA error: out of memory",
            "[0] Traceback (most recent call last):",
        ]
    }
    found = first_error(logs, died=Death("worker-0", 1, "ended with exit code 4"))
    assert found is not None
    assert (found.who, found.line) == ("worker-0 rank 1", 2)


def test_the_first_of_several_lives_counts() -> None:
    marker = f"--- rank 1 of worker-0 {KILLED}; restart 1 of 3 ---"
    logs = {
        "worker-0": [
            "10:00:00.000 info    worker-0  registered",
            "1: Segmentation fault (core dumped)",
            "",
            marker,
            "10:05:00.000 critical worker-0  second life failed, too",
        ],
        "worker-1": ["10:01:00.000 error   worker-1  unrelated"],
    }
    found = first_error(logs, died=Death("worker-0", None, "ended with exit code 4"))
    assert found is not None
    assert (found.who, found.line, found.how) == ("worker-0 rank 1", 2, KILLED)
    assert not any("second life" in line for line in found.lines)


def test_json_lines_tell_time_level_and_rank() -> None:
    def event(time: str, level: str, process: str, text: str) -> str:
        return json.dumps({"time": time, "level": level, "process": process, "event": text})

    logs = {
        "w": [
            event("2026-11-20T10:00:01.000Z", "info", "w", "x"),
            event("2026-11-20T10:00:02.000Z", "error", "w rank 3", "bad"),
        ],
        "broken": ['{"time": 7', "{}"],
    }
    found = first_error(logs)
    assert found is not None
    assert (found.who, found.line) == ("w rank 3", 2)
    assert "2026-11-20 10:00:02 UTC" in as_text(found)


def test_a_process_that_wrote_nothing_is_named_all_the_same() -> None:
    found = first_error({}, died=Death("prefill-1", None, "was killed by SIGKILL (signal 9)"))
    assert found is not None
    assert "prefill-1" in as_text(found)
    assert "it wrote nothing" in as_text(found)


def test_a_rank_with_a_log_of_its_own_is_asked_first() -> None:
    logs = {
        "worker-0": [
            "srun: error: n2: task 1: Exited with exit code 1",
            "--- rank 1 of worker-0 on n2 ended with exit code 1; restart 1 of 3 ---",
        ],
        "worker-0.rank0": ["10:00:00.000 info    worker-0  waiting"],
        "worker-0.rank1": [
            "10:00:00.500 info    worker-0 rank 1  loading",
            "ValueError: no weights",
        ],
    }
    found = first_error(logs)
    assert found is not None
    assert (found.who, found.line) == ("worker-0 rank 1", 2)
    died = Death("worker-0", 1, KILLED)
    again = first_error({name: lines for name, lines in logs.items() if "." in name}, 0.0, died)
    assert again is not None
    assert again.lines[-1] == "ValueError: no weights"
