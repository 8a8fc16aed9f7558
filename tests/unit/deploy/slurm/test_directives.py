"""The text of batch scripts, whole, and what is refused because SLURM would cut it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from trtllm_workers.deploy.slurm.directives import BatchJob, directive, sbatch_text
from trtllm_workers.errors import ConfigError

AWKWARD = [
    "a model",
    "it's",
    'say "hi"',
    "a;b",
    "$HOME",
    "new\nline",
    "#SBATCH --nodes=9",
    "",
    "ü",
    "\\n",
]

JOB = BatchJob(name="demo", words=("trtllm-launch", "slurm", "serve"))


def test_the_script_of_a_plain_job(golden: Callable[[str, str], None]) -> None:
    golden("sbatch_plain.txt", sbatch_text(JOB))


def test_the_script_of_a_job_with_everything(golden: Callable[[str, str], None]) -> None:
    job = BatchJob(
        name="qwen3 #2",
        words=("/opt/a b/trtllm-launch", "slurm", "serve", "--model", "it's", "--x", "$HOME"),
        num_nodes=4,
        gpu_flags=("--gpus-per-node=8",),
        account="astro",
        partition="gpu",
        qos="high",
        time_limit="1-00:00:00",
        output="/home/me/runs with space/%j.out",
        chdir="/home/me/100% done",
        no_kill=True,
        no_requeue=True,
        signal_before_end_s=120,
        extra=("--exclusive", '--comment=say "hi" #1 \\o/', "--constraint=h100&ib"),
    )
    golden("sbatch_everything.txt", sbatch_text(job))


@pytest.mark.parametrize("word", AWKWARD)
def test_the_command_gets_its_words_unchanged(word: str) -> None:
    text = sbatch_text(replace(JOB, words=("printf", "%s|", "first", word)))
    done = subprocess.run(["sh"], input=text, capture_output=True, text=True, timeout=20)
    assert done.stdout == f"first|{word}|"


def test_no_word_of_the_command_becomes_a_directive() -> None:
    lines = sbatch_text(replace(JOB, words=("run", "\n#SBATCH --nodes=9\n"))).splitlines()
    first_command = next(at for at, line in enumerate(lines) if not line.startswith("#"))
    assert lines[first_command].startswith("exec run ")
    assert not any("--nodes=9" in line for line in lines[:first_command])


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--exclusive", "--exclusive"),
        ("--comment=plain", "--comment=plain"),
        ("--comment=a#b", '--comment="a#b"'),
        ("--comment=a b", '--comment="a b"'),
        ('--comment=a"b', '--comment="a\\"b"'),
        ("--comment=a\\b", '--comment="a\\\\b"'),
        ("--comment=it's", '--comment="it\'s"'),
        ("--comment=", '--comment=""'),
        ("--nodelist=sn[1-4],x", "--nodelist=sn[1-4],x"),
    ],
)
def test_a_value_is_quoted_where_slurm_would_cut_it(flag: str, text: str) -> None:
    assert directive(flag) == text
    assert shlex.split(text) == [flag]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": " "}, "without a name"),
        ({"name": "a\nb"}, "no line breaks"),
        ({"words": ()}, "without a command"),
        ({"words": ("a\r\nb",)}, "DOS line breaks"),
        ({"words": ("a\0b",)}, "NUL"),
        ({"num_nodes": 0}, "at least one"),
        ({"account": "astro geo"}, "--account: 'astro geo' is no name"),
        ({"partition": ""}, "--partition: '' is no name"),
        ({"qos": "a\nb"}, "--qos"),
        ({"time_limit": "tomorrow"}, "--time 'tomorrow': write minutes"),
        ({"output": "runs/%j.out"}, "absolute"),
        ({"output": "/runs/100%/%j.out"}, "/runs/100%/%j.out: SLURM would read its %"),
        ({"output": "/runs/%%/%j.out"}, "would read its %"),
        ({"output": "/runs/%N.out"}, "only %j, %x"),
        ({"output": "/a\\b/%j.out"}, "would read its %"),
        ({"chdir": "here"}, "--chdir here: give an absolute path"),
        ({"signal_before_end_s": 0}, "1 to 65535"),
        ({"signal_before_end_s": 70_000}, "1 to 65535"),
        ({"extra": ("--comment=a\nb",)}, "no line breaks"),
        ({"extra": ("--comment=a\x1bb",)}, "control characters"),
        ({"extra": ("-C",)}, "is no flag of sbatch"),
        ({"extra": ("--nodes 3",)}, "is no flag of sbatch"),
        ({"extra": ("--nodes=3",)}, "--nodes is given twice"),
        ({"extra": ("--gres=gpu:1",), "gpu_flags": ("--gres=gpu:2",)}, "--gres is given twice"),
    ],
)
def test_what_slurm_would_misread_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sbatch_text(replace(JOB, **change))


@pytest.mark.parametrize("limit", ["30", "00:10:00", "2-12", "UNLIMITED"])
def test_times_that_slurm_knows_are_passed_on(limit: str) -> None:
    assert f"#SBATCH --time={limit}\n" in sbatch_text(replace(JOB, time_limit=limit))
