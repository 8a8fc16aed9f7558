"""container/run.sh with fake engines: which command it makes of which flags, and that no secret shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shell.containers import AWKWARD, ROOT, Bench, pairs, split_as_bash_does, versions

VERSION = versions()["TRTLLM_LAUNCH_VERSION"]
ALWAYS = [
    *("--network", "host", "--ipc", "host", "--shm-size=10G", "--ulimit", "memlock=-1"),
    *("--ulimit", "stack=67108864", "--ulimit", "nofile=65536:65536"),
    *("--cap-add", "CAP_SYS_PTRACE", "--stop-timeout", "60"),
]
IMAGE = f"trtllm-launch:{VERSION}-trtllm"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def docker(bench: Bench) -> Bench:
    bench.install("docker")
    return bench


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", ("--", "launch/disagg.sh")),
        ("workspace", ("--mount-workspace",)),
        ("cpu", ("--framework", "cpu", "--", "trtllm-launch", "doctor")),
        ("podman", ("--engine", "podman", "--gpus", "device=0,1", "--", "launch/agg.sh")),
    ],
)
def test_dry_run(
    bench: Bench, name: str, words: tuple[str, ...], golden: Callable[[str, str], None]
) -> None:
    shown = bench.shown("run.sh", *words)
    golden(f"container_run_{name}.txt", shown.replace(str(ROOT), "ROOT"))


def test_the_engine_gets_what_serving_needs(docker: Bench) -> None:
    assert docker.call("run.sh", "--", "launch/agg.sh", "--http-port", "9000") == [
        *("docker", "run", "--rm", "--gpus", "all", *ALWAYS, "--workdir", "/workspace"),
        *(IMAGE, "launch/agg.sh", "--http-port", "9000"),
    ]


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_an_engine_gets_what_the_dry_run_shows(bench: Bench, engine: str) -> None:
    words = ("--engine", engine, "-v", "/a b:/c", "-it", "--", "launch/agg.sh", "it's")
    shown = split_as_bash_does(bench.shown("run.sh", *words))
    bench.install(engine)
    assert bench.call("run.sh", *words) == shown


def test_podman_takes_devices_by_name_and_no_size_for_shared_memory_of_the_host(
    bench: Bench,
) -> None:
    bench.install("podman")
    words = bench.call("run.sh")
    assert pairs(words, "--device") == ["nvidia.com/gpu=all"]
    assert not {"--gpus", "--shm-size=10G"} & set(words)
    words = bench.call("run.sh", "--gpus", "device=2,3")
    assert pairs(words, "--device") == ["nvidia.com/gpu=2", "nvidia.com/gpu=3"]
    assert "--gpus 2: for podman it is one of all, none, device=0,1" in bench.refused(
        "run.sh", "--gpus", "2"
    )


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ((), ["all"]),
        (("--gpus", "all"), ["all"]),
        (("--gpus", "2"), ["2"]),
        (("--gpus", "device=0,1"), ['"device=0,1"']),
        (("--gpus", "none"), []),
        (("--framework", "cpu"), []),
        (("--target", "cpu"), []),
        (("--framework", "cpu", "--gpus", "all"), ["all"]),
        (("--framework", "torch"), ["all"]),
    ],
)
def test_gpus_are_those_asked_for(docker: Bench, given: tuple[str, ...], got: list[str]) -> None:
    assert pairs(docker.call("run.sh", *given), "--gpus") == got


@pytest.mark.parametrize(
    ("given", "image"),
    [
        (("--framework", "TENSORRTLLM"), IMAGE),
        (("--framework", "cpu"), f"trtllm-launch:{VERSION}-cpu"),
        (("--target", "torch"), f"trtllm-launch:{VERSION}-torch"),
        (("--framework", "cpu", "--target", "wheel"), f"trtllm-launch:{VERSION}-wheel"),
        (("--image", "a/b:c", "--target", "torch"), "a/b:c"),
    ],
)
def test_the_image_is_the_one_that_build_sh_made(
    docker: Bench, given: tuple[str, ...], image: str
) -> None:
    assert docker.call("run.sh", *given)[-1] == image


@pytest.mark.parametrize("value", AWKWARD)
def test_values_pass_unchanged_and_dry_runs_can_be_pasted(docker: Bench, value: str) -> None:
    given = (
        *("--image", f"i{value}", "--name", value, "--entrypoint", value, "-e", f"A={value}"),
        *("-v", f"/{value}:/b", "--volume", f"/{value}:/d", "--", value, value),
    )
    shown = split_as_bash_does(docker.shown("run.sh", *given))
    words = docker.call("run.sh", *given)
    assert shown == words
    assert pairs(words, "--name") == [value]
    assert pairs(words, "--entrypoint") == [value]
    assert pairs(words, "--env") == [f"A={value}"]
    assert pairs(words, "--volume") == [f"/{value}:/b", f"/{value}:/d"]
    assert words[-3:] == [f"i{value}", value, value]


@pytest.mark.parametrize(
    ("given", "removed"),
    [
        ((), True),
        (("--rm",), True),
        (("--rm", "TRUE"), True),
        (("--rm", "FALSE"), False),
        (("--rm=false",), False),
    ],
)
def test_containers_are_removed_unless_told_otherwise(
    docker: Bench, given: tuple[str, ...], removed: bool
) -> None:
    assert ("--rm" in docker.call("run.sh", *given)) is removed


def test_rights_and_terminals_are_given_only_when_asked_for(docker: Bench) -> None:
    words = docker.call("run.sh")
    assert not {"--privileged", "-it"} & set(words)
    assert {"--privileged", "-it"} <= set(docker.call("run.sh", "--privileged", "-it"))
    assert "--privileged" not in docker.call("run.sh", "--privileged", "FALSE")


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "NATS_TOKEN", "CLUSTER_SECRET", "ETCD_PASSWORD", "my_secret"]
)
def test_the_value_of_a_secret_is_never_shown(docker: Bench, name: str) -> None:
    value = "hush it's a secret"
    done = docker.run("run.sh", "--dry-run", "-e", f"{name}={value}", f"--env={name}={value}")
    assert "hush" not in done.stdout + done.stderr
    words = docker.call("run.sh", "-e", f"{name}={value}")
    assert pairs(words, "--env") == [name]
    assert docker.passed_on()[name] == value


def test_a_variable_may_be_given_by_name(docker: Bench) -> None:
    assert pairs(docker.call("run.sh", "-e", "NATS_TOKEN", "-e", "A"), "--env") == [
        "NATS_TOKEN",
        "A",
    ]


def test_the_cache_of_hugging_face_comes_with_its_token_by_name(
    docker: Bench, tmp_path: Path
) -> None:
    cache = tmp_path / "hf cache"
    cache.mkdir()
    words = docker.call("run.sh", "--hf-cache", str(cache), HF_TOKEN="hush")
    assert pairs(words, "--volume") == [f"{cache}:/home/launch/.cache/huggingface"]
    assert pairs(words, "--env") == ["HF_HOME=/home/launch/.cache/huggingface", "HF_TOKEN"]
    assert "hush" not in "".join(words)
    assert pairs(docker.call("run.sh", "--hf-cache", str(cache)), "--env") == [
        "HF_HOME=/home/launch/.cache/huggingface"
    ]
    assert "HF_TOKEN" not in docker.call("run.sh", HF_TOKEN="hush")
    assert "there is no such folder" in docker.refused("run.sh", "--hf-cache", "/gone")


def test_a_mounted_workspace_is_run_from_source(docker: Bench) -> None:
    words = docker.call("run.sh", "--mount-workspace", "--framework", "cpu")
    assert pairs(words, "--volume") == [f"{ROOT}:/workspace"]
    assert pairs(words, "--env") == [
        "PYTHONPATH=/workspace",
        "TRTLLM_LAUNCH_VENV=/usr/local",
    ]
    assert "-it" in words
    assert words[-1] == "bash"
    assert "--privileged" not in words
    assert docker.call("run.sh", "--mount-workspace", "--", "launch/agg.sh")[-1] == "launch/agg.sh"


def test_a_mounted_workspace_takes_the_cache_that_is_there(docker: Bench) -> None:
    cache = docker.home / ".cache" / "huggingface"
    cache.mkdir(parents=True)
    words = docker.call("run.sh", "--mount-workspace")
    assert f"{cache}:/home/launch/.cache/huggingface" in pairs(words, "--volume")
    words = docker.call("run.sh", "--mount-workspace", "--hf-cache", "none")
    assert pairs(words, "--volume") == [f"{ROOT}:/workspace"]


def test_without_an_engine_it_says_what_to_install(bench: Bench) -> None:
    bench.install("buildah")  # builds, and runs nothing
    assert "apt-get install podman" in bench.refused("run.sh")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mount-workspaces",), "unknown flag '--mount-workspaces'; did you mean"),
        (("--mount",), "unknown flag '--mount'; did you mean '--mount-workspace'?"),
        (("--gpu", "all"), "unknown flag '--gpu'; did you mean '--gpus'?"),
        (("--priviliged",), "unknown flag '--priviliged'; did you mean '--privileged'?"),
        (("-x",), "unknown flag '-x'; --help lists all"),
        (("launch/agg.sh",), "'launch/agg.sh' is no flag; put -- before the command to run"),
        (("--name",), "--name needs a value"),
        (("-v",), "-v needs a value"),
        (("--framework", "vllm"), "serves with TensorRT-LLM"),
    ],
)
def test_mistakes_are_named(docker: Bench, words: tuple[str, ...], said: str) -> None:
    assert said in docker.refused("run.sh", *words)


@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_help_lists_every_flag(bench: Bench, script: str) -> None:
    done = bench.run(script, "--help")
    assert done.returncode == 0
    text = (ROOT / "container" / script).read_text()
    flags = text[text.index("flags=(") + 7 :]
    listed = set(flags[: flags.index(")")].split()) - {"--help"}
    assert listed
    assert not {flag for flag in listed if flag not in done.stdout}
    assert bench.run(script, "-h").stdout == done.stdout
