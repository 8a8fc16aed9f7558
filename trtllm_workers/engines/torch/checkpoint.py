"""The weights of a Hugging Face folder, tensor by tensor. Knows files, not layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trtllm_workers.errors import ConfigError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Part:
    """``count`` rows of a tensor, from ``first`` on."""

    first: int
    count: int


class Checkpoint:
    """Open safetensors files of one folder; a context manager, so that no mapping stays open.

    ``take`` reads one tensor as ``dtype`` on the CPU and reports the share taken so far. Every
    failure is a ConfigError that names the file and the tensor.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, on_progress: Callable[[float], None]
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._on_progress = on_progress
        self._open: dict[str, Any] = {}
        self._places = _places(folder)
        self._num_taken = 0

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()

    @property
    def names(self) -> Collection[str]:
        """All tensors of the folder."""
        return self._places.keys()

    def first_of(self, *names: str) -> str:
        """Return the first of these names that is here, or the first of all where none is."""
        return next((name for name in names if name in self._places), names[0])

    def take(self, name: str, *shape: int, part: Part | None = None) -> torch.Tensor:
        """Return one tensor, its shape checked; with ``part`` nothing else of it is read."""
        file = self._places.get(name)
        if file is None:
            raise _error(
                f"{self._folder}: no tensor '{name}' of shape {list(shape)} in its safetensors files; "
                "the checkpoint is incomplete or of another architecture than config.json says"
            )
        found, tensor = self._read(file, name, shape, part)
        if found != shape:
            raise _error(
                f"{self._folder / file}: tensor '{name}' has shape {list(found)}, "
                f"but config.json asks for {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise _error(
                f"{self._folder / file}: tensor '{name}' holds {tensor.dtype}, not floating point; "
                "quantized checkpoints are not supported"
            )
        self._num_taken += 1
        self._on_progress(min(1.0, self._num_taken / len(self._places)))
        return tensor.to(self._dtype)

    def _read(
        self, file: str, name: str, shape: tuple[int, ...], part: Part | None
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Return a tensor's whole shape and the wanted part of it, if it has ``shape``."""
        path = self._folder / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, framework="pt", device="cpu")
            if part is not None:
                whole = self._open[file].get_slice(name)
                found = tuple(whole.get_shape())
                if found == shape:
                    return found, whole[part.first : part.first + part.count]
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _error(
                f"{path}: cannot read tensor '{name}': {error}; is the file cut short?"
            ) from error
        return tuple(tensor.shape), tensor


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted. Raises ConfigError when there are none."""
    return [folder / file for file in sorted(set(_places(folder).values()))]


def model_id_of(folder: Path) -> str:
    """Return the folder's name and a digest of its config and weights.

    Equal on every host that serves a copy of the same model. Only the ends of each weight file are
    read: the first holds every tensor's name and place, the last real weights.
    """
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=6)
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{folder.resolve().name}-{digest.hexdigest()}"


def _places(folder: Path) -> dict[str, str]:
    """Return tensor name → file name."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _error(f"{index}: no weight_map of tensor names to files: {error!r}") from error
        for file in sorted(set(places.values())):
            if not (folder / file).is_file():
                raise _error(f"{folder / file} is missing, though {_INDEX} names it")
        return places
    path = folder / _SINGLE
    if not path.is_file():
        held = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
        hint = (
            "; convert its weights to safetensors" if any(".bin" in name for name in held) else ""
        )
        raise _error(f"{folder} holds neither {_SINGLE} nor {_INDEX}{hint}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    except (SafetensorError, OSError, ValueError) as error:
        raise _error(f"{path}: no safetensors file: {error}; is it cut short?") from error


def _error(message: str) -> ConfigError:
    return ConfigError(message, param="model_path")
