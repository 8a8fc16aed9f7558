#!/usr/bin/env python3
"""What a build asks of NVIDIA's TensorRT-LLM release image. Imports nothing of it: a build has no GPU.

release_image.py check 1.2.1        # is it that version, with NIXL?
release_image.py pins               # every installed package as NAME==VERSION
release_image.py unchanged FILE     # are all those of FILE still as they were?
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from packaging.version import InvalidVersion, Version

# What TensorRT-LLM loads for `cache_transceiver_config.backend: NIXL`, beside its own library; and NIXL
# itself: inside the wheel, or where the image's build put it.
_WRAPPER = "libtensorrt_llm_nixl_wrapper.so"
_SYSTEM_NIXL = Path("/opt/nvidia/nvda_nixl")


class WrongImage(Exception):
    """The image is not fit to build on; the message says why and what to do."""


def check(wanted: str, system_nixl: Path = _SYSTEM_NIXL) -> str:
    """Return what was found; raise WrongImage for another version or without NIXL."""
    try:
        version = metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        raise WrongImage(
            "TensorRT-LLM is not installed for this image's python3; "
            "build on nvcr.io/nvidia/tensorrt-llm/release (--base-image)"
        ) from None
    if version != wanted:
        raise WrongImage(
            f"this image holds TensorRT-LLM {version}, and {wanted} is asked for; "
            "give the fitting --base-image-tag, or --build-arg TRTLLM_VERSION=… to take it as it is"
        )
    spec = util.find_spec("tensorrt_llm")
    if spec is None or spec.origin is None:
        raise WrongImage(
            "the package tensorrt_llm has metadata and no code; take another --base-image"
        )
    libs = Path(spec.origin).parent / "libs"
    if not (libs / _WRAPPER).is_file():
        raise WrongImage(
            f"this TensorRT-LLM was built without NIXL: there is no {libs / _WRAPPER}; "
            "take a release image of NVIDIA's, they have it"
        )
    for folder in (libs / "nixl", system_nixl):
        found = next(iter(sorted(folder.rglob("libnixl.so*"))), None)
        if found is not None:
            return f"TensorRT-LLM {version}, NIXL {found}"
    raise WrongImage(
        f"NIXL itself is missing: no libnixl.so under {libs / 'nixl'} or {system_nixl}; "
        "take a release image of NVIDIA's, they have it"
    )


def installed() -> dict[str, str]:
    """Return every package that an import would find, by its normalised name, with its version."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        name = package.metadata["Name"]
        if name:  # a folder left half removed has none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), package.version)
    return found


def pins(found: dict[str, str]) -> Iterator[str]:
    """Yield a constraint for each package whose version pip understands; nobody asks for others."""
    for name, version in sorted(found.items()):
        try:
            Version(version)
        except InvalidVersion:
            continue
        yield f"{name}=={version}"


def changes(before: list[str], now: dict[str, str]) -> list[str]:
    """Return a line for each package that is gone or has another version."""
    pairs = (line.split("==", 1) for line in before)
    return [
        f"{name} was {version} and is {now.get(name, 'gone')}"
        for name, version in pairs
        if now.get(name) != version
    ]


def main(words: list[str]) -> int:
    """Do what the first word says."""
    if words[:1] == ["check"] and len(words) == 2:
        try:
            sys.stdout.write(check(words[1]) + "\n")
        except WrongImage as error:
            sys.stderr.write(f"build: {error}\n")
            return 1
        return 0
    if words == ["pins"]:
        sys.stdout.writelines(f"{pin}\n" for pin in pins(installed()))
        return 0
    if words[:1] == ["unchanged"] and len(words) == 2:
        found = changes(Path(words[1]).read_text().split(), installed())
        sys.stderr.writelines(
            f"build: {line}; the image's own packages must stay\n" for line in found
        )
        return 1 if found else 0
    sys.stderr.write(f"{__doc__}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
