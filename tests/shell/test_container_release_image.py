"""What a build asks of NVIDIA's release image, on folders of packages made up for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "container" / "release_image.py"


class Packages:
    """A folder that stands for what is installed in an image."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, version: str) -> None:
        for old in self.path.glob(f"{name}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        folder = self.path / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )

    def add_tensorrt_llm(self, version: str, *files: str) -> None:
        self.add("tensorrt_llm", version)
        for name in ("__init__.py", *files):
            path = self.path / "tensorrt_llm" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Importing it would fail, as it does where there is no driver: a build must not.
            path.write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(self.path)},
            capture_output=True,
            text=True,
            timeout=30,
        )


WRAPPER = "libs/libtensorrt_llm_nixl_wrapper.so"


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages(tmp_path / "dist-packages")


def test_a_release_image_is_taken_as_it_is(packages: Packages) -> None:
    packages.add_tensorrt_llm("1.2.1", WRAPPER, "libs/nixl/libnixl.so")
    done = packages.run("check", "1.2.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TensorRT-LLM 1.2.1, NIXL /")


@pytest.mark.parametrize(
    ("version", "files", "said"),
    [
        ("1.3.0", (WRAPPER, "libs/nixl/libnixl.so"), "holds TensorRT-LLM 1.3.0, and 1.2.1 is"),
        ("1.2.1", (), "was built without NIXL: there is no "),
        ("1.2.1", (WRAPPER,), "NIXL itself is missing: no libnixl.so under "),
    ],
)
def test_an_image_that_will_not_do_ends_the_build(
    packages: Packages, version: str, files: tuple[str, ...], said: str
) -> None:
    packages.add_tensorrt_llm(version, *files)
    done = packages.run("check", "1.2.1")
    assert done.returncode == 1
    assert done.stderr.startswith("build: ")
    assert said in done.stderr


def test_an_image_without_tensorrt_llm_ends_the_build(packages: Packages) -> None:
    packages.path.mkdir()
    done = packages.run("check", "1.2.1")
    assert done.returncode == 1
    assert "TensorRT-LLM is not installed for this image's python3" in done.stderr


def test_what_is_installed_is_pinned_with_nvidias_own_versions(packages: Packages) -> None:
    packages.add("torch", "2.10.0a0+b4e4ee81d3.nv25.12")
    packages.add("Some_Odd.Name", "1.0")
    packages.add("odd", "not-a-version-of-pip")
    pins = packages.run("pins").stdout.splitlines()
    assert "torch==2.10.0a0+b4e4ee81d3.nv25.12" in pins
    assert "some-odd-name==1.0" in pins
    assert not [pin for pin in pins if pin.startswith("odd==")]


def test_pip_accepts_the_pins(packages: Packages, tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    packages.add("torch", "2.10.0a0+b4e4ee81d3.nv25.12")
    pins.write_text(packages.run("pins").stdout)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-index"),
            *("--constraint", str(pins), "click"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_package_that_was_replaced_is_named(packages: Packages, tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    packages.add("numpy", "1.26.4")
    packages.add("mpi4py", "4.1.1")
    pins.write_text(packages.run("pins").stdout)
    assert packages.run("unchanged", str(pins)).returncode == 0
    packages.add("brought", "1.0")
    assert packages.run("unchanged", str(pins)).returncode == 0
    packages.add("numpy", "2.4.0")
    done = packages.run("unchanged", str(pins))
    assert done.returncode == 1
    assert (
        done.stderr == "build: numpy was 1.26.4 and is 2.4.0; the image's own packages must stay\n"
    )


def test_other_words_are_refused(packages: Packages) -> None:
    assert packages.run("chekc", "1.2.1").returncode == 2
