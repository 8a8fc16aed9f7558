"""container/build.sh with fake engines: which command it makes of which flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shell.containers import (
    AWKWARD,
    ENGINES,
    FOLDER,
    ROOT,
    Bench,
    pairs,
    split_as_bash_does,
    versions,
)

VERSIONS = versions()
VERSION = VERSIONS["TRTLLM_LAUNCH_VERSION"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def docker(bench: Bench) -> Bench:
    bench.install("docker")
    return bench


def build_args(words: list[str]) -> dict[str, str]:
    """Return build arguments as an engine reads them: of two with one name the last counts."""
    return dict(pair.split("=", 1) for pair in pairs(words, "--build-arg") if "=" in pair)


@pytest.mark.parametrize("framework", ["cpu", "torch", "trtllm"])
def test_dry_run_of_each_framework(
    bench: Bench, framework: str, golden: Callable[[str, str], None]
) -> None:
    line = bench.shown("build.sh", "--framework", framework)
    revision = build_args(split_as_bash_does(line))["REVISION"]
    shown = line.replace(str(ROOT), "ROOT").replace(f"REVISION={revision}", "REVISION=…")
    golden(f"container_build_{framework}.txt", shown)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gets_what_the_dry_run_shows(bench: Bench, engine: str) -> None:
    words = ("--engine", engine, "--framework", "cpu", "--tag", "a b")
    shown = split_as_bash_does(bench.shown("build.sh", *words))
    bench.install(engine)
    if engine == "docker":
        assert shown[:2] == ["env", "DOCKER_BUILDKIT=1"]
        shown = shown[2:]
    assert bench.call("build.sh", *words) == shown
    assert bench.passed_on().get("DOCKER_BUILDKIT") == ("1" if engine == "docker" else None)


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        (("buildah",), "buildah"),
        (("buildah", "podman"), "podman"),
        (("buildah", "podman", "docker"), "docker"),
    ],
)
def test_the_first_engine_on_path_is_taken(
    bench: Bench, installed: tuple[str, ...], taken: str
) -> None:
    bench.install(*installed)
    assert bench.call("build.sh")[0] == taken


def test_health_checks_survive_in_images_of_podman_and_buildah(bench: Bench) -> None:
    bench.install("podman", "buildah")
    for engine in ("podman", "buildah"):
        assert pairs(bench.call("build.sh", "--engine", engine), "--format") == ["docker"]


def test_without_an_engine_it_says_what_to_install(bench: Bench) -> None:
    assert "apt-get install podman" in bench.refused("build.sh")
    assert "--engine podman: it is not on PATH" in bench.refused("build.sh", "--engine", "podman")
    assert "--engine 'nerdctl' is none of auto docker podman buildah" in bench.refused(
        "build.sh", "--engine", "nerdctl"
    )


@pytest.mark.parametrize("name", ["trtllm", "TRTLLM", "TensorRTLLM", "TENSORRTLLM", "tensorrt-llm"])
def test_every_name_of_tensorrt_llm_is_understood(docker: Bench, name: str) -> None:
    words = docker.call("build.sh", "--framework", name)
    assert pairs(words, "--target") == ["trtllm"]
    assert pairs(words, "--tag") == [f"trtllm-launch:{VERSION}-trtllm"]


@pytest.mark.parametrize("name", ["VLLM", "vllm", "SGLang"])
def test_frameworks_of_others_are_refused_with_a_sentence(docker: Bench, name: str) -> None:
    said = docker.refused("build.sh", "--framework", name)
    assert f"--framework {name}: this toolkit serves with TensorRT-LLM" in said


def test_an_unknown_framework_is_refused(docker: Bench) -> None:
    assert "'cpuu' is none of trtllm, torch, cpu" in docker.refused(
        "build.sh", "--framework", "cpuu"
    )


def test_each_framework_stands_on_its_own_base(docker: Bench) -> None:
    ours = f"{VERSIONS['BASE_IMAGE']}:{VERSIONS['BASE_IMAGE_TAG']}"
    nvidias = f"{VERSIONS['TRTLLM_IMAGE']}:{VERSIONS['TRTLLM_VERSION']}"
    for framework, bases in (
        ("cpu", ("mine", nvidias)),
        ("torch", ("mine", nvidias)),
        ("trtllm", (ours, "mine")),
    ):
        # Engines want a name for every FROM, also of stages that they do not build.
        given = build_args(docker.call("build.sh", "--target", framework))
        assert (given["BASE_IMAGE"], given["TRTLLM_BASE_IMAGE"]) == (ours, nvidias)
        given = build_args(docker.call("build.sh", "--target", framework, "--base-image", "mine"))
        assert (given["BASE_IMAGE"], given["TRTLLM_BASE_IMAGE"]) == bases


@pytest.mark.parametrize(
    ("given", "base"),
    [
        (("--base-image", "mine"), "mine"),
        (("--base-image", "host:5000/mine"), "host:5000/mine"),
        (("--base-image", "host:5000/mine:1"), "host:5000/mine:1"),
        (("--base-image", "mine@sha256:0"), "mine@sha256:0"),
        (("--base-image", "mine", "--base-image-tag", "2"), "mine:2"),
        (("--base-image-tag", "12-slim"), f"{VERSIONS['BASE_IMAGE']}:12-slim"),
        (("--base-image-tag", "sha256:0"), f"{VERSIONS['BASE_IMAGE']}@sha256:0"),
    ],
)
def test_the_base_image_can_be_chosen(docker: Bench, given: tuple[str, ...], base: str) -> None:
    assert build_args(docker.call("build.sh", "--target", "cpu", *given))["BASE_IMAGE"] == base


def test_two_tags_for_one_base_are_refused(docker: Bench) -> None:
    said = docker.refused("build.sh", "--base-image", "mine:1", "--base-image-tag", "2")
    assert "--base-image mine:1 has a tag already" in said


def test_a_framework_is_also_known_by_its_target(docker: Bench) -> None:
    words = docker.call("build.sh", "--target", "torch")
    assert pairs(words, "--target") == ["torch"]
    assert "TORCH_CUDA" in build_args(words)
    said = docker.refused("build.sh", "--target", "torch", "--framework", "cpu")
    assert "--target torch is not of --framework cpu" in said


def test_another_stage_gives_the_image_its_name(docker: Bench) -> None:
    words = docker.call("build.sh", "--framework", "cpu", "--target", "wheel")
    assert pairs(words, "--target") == ["wheel"]
    assert pairs(words, "--tag") == [f"trtllm-launch:{VERSION}-wheel"]


def test_what_is_given_wins_over_versions_env(docker: Bench) -> None:
    words = docker.call(
        "build.sh", "--target", "cpu", "--build-arg", "TORCH_CPU=torch==9", "--build-arg", "EXTRAS"
    )
    assert build_args(words)["TORCH_CPU"] == "torch==9"
    assert "EXTRAS" in pairs(words, "--build-arg")


@pytest.mark.parametrize("value", AWKWARD)
def test_values_pass_unchanged_and_dry_runs_can_be_pasted(docker: Bench, value: str) -> None:
    given = (
        *("--framework", "cpu", "--base-image", value, "--tag", value),
        *("--build-arg", f"A={value}", "--cache-from", value, "--cache-to", value),
        *("--target", value, "--", value),
    )
    shown = split_as_bash_does(docker.shown("build.sh", *given))
    words = docker.call("build.sh", *given)
    assert shown == ["env", "DOCKER_BUILDKIT=1", *words]
    assert build_args(words)["A"] == value
    assert build_args(words)["BASE_IMAGE"] == value
    for flag in ("--tag", "--cache-from", "--cache-to", "--target"):
        assert pairs(words, flag) == [value]
    assert words[-2:] == [value, str(ROOT)]


def test_the_other_flags_reach_the_engine(docker: Bench, tmp_path: Path) -> None:
    config = tmp_path / "pip conf"
    config.write_text("")
    words = docker.call(
        "build.sh",
        *("--platform", "linux/arm64", "--no-cache", "--uid", "5", "--gid=6"),
        *("--pip-config", str(config), "--tag", "a", "--tag", "b"),
    )
    assert pairs(words, "--platform") == ["linux/arm64"]
    assert "--no-cache" in words
    assert build_args(words)["USER_UID"] == "5"
    assert build_args(words)["USER_GID"] == "6"
    assert pairs(words, "--secret") == [f"id=pip_config,src={config}"]
    assert pairs(words, "--tag") == ["a", "b"]


def test_the_command_is_the_same_from_any_folder(docker: Bench) -> None:
    here = docker.shown("build.sh")
    docker.cwd = FOLDER
    assert docker.shown("build.sh") == here
    assert f"--file {FOLDER / 'Dockerfile'}" in here


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--framwork", "cpu"), "unknown flag '--framwork'; did you mean '--framework'?"),
        (("--frame", "cpu"), "unknown flag '--frame'; did you mean '--framework'?"),
        (("--buildarg=A=1",), "unknown flag '--buildarg'; did you mean '--build-arg'?"),
        (("--enable-kvbm",), "unknown flag '--enable-kvbm'; --help lists all"),
        (("cpu",), "unknown flag 'cpu'; --help lists all"),
        (("--tag",), "--tag needs a value"),
        (("--platform", "amd64"), "--platform 'amd64' is none of linux/amd64, linux/arm64"),
        (("--uid", "0"), "not '0': images do not run as root"),
        (("--gid", "x"), "not 'x'"),
        (("--pip-config", "/gone"), "--pip-config /gone: there is no such file"),
    ],
)
def test_mistakes_are_named(docker: Bench, words: tuple[str, ...], said: str) -> None:
    assert said in docker.refused("build.sh", *words)
