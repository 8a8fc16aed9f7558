"""Opening local files that a request names: regular files under one folder, by their real path.

The path is resolved first, and what it resolves to is opened one component at a time without following
links, so that nothing that is swapped in between leads out of the folder. A client is told the same
whether a file is missing, is no regular file, or is not to be read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.descriptors import Descriptor
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)

_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO would wait for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PIECE = 1 << 20


class _Refused(Exception):
    """Why a path is not opened, for the log only."""


def _nothing() -> None:
    """Do nothing between resolving a path and opening it."""


def open_file(
    path: str,
    allowed: Path | None,
    param: str,
    max_bytes: int,
    *,
    between: Callable[[], None] = _nothing,
) -> Descriptor:
    """Open a file for reading; relative paths are taken from ``allowed``. It blocks.

    Raises MediaRejected. ``between`` is called after the path was resolved and before it is opened.
    """
    if allowed is None:
        raise MediaRejected(
            f"{param}: this deployment reads no local files; send an http(s) or data: URL",
            param=param,
        )
    try:
        file = Descriptor(_open(path, allowed, between))
    except (OSError, ValueError, _Refused) as error:
        log.warning("a local file was refused", param=param, path=path, reason=str(error))
        raise MediaRejected(
            f"{param}: this names no file that may be read here", param=param
        ) from error
    if file.num_bytes > max_bytes:
        file.close()
        raise too_large(param, max_bytes)
    return file


def read_whole(fd: int, num_bytes: int, param: str) -> bytes:
    """Return the bytes of a file of ``num_bytes``. Raises MediaRejected when it has another size by now."""
    pieces: list[bytes] = []
    at = 0
    while at < num_bytes and (piece := os.pread(fd, min(_PIECE, num_bytes - at), at)):
        pieces.append(piece)
        at += len(piece)
    if os.fstat(fd).st_size != num_bytes or at != num_bytes:
        raise MediaRejected(f"{param}: this file changed while it was read", param=param)
    return b"".join(pieces)


def too_large(param: str, max_bytes: int) -> MediaRejected:
    """Return the error for a file that is larger than files may be."""
    return MediaRejected(
        f"{param}: this file has more than the {max_bytes} bytes that are taken", param=param
    )


def _open(path: str, allowed: Path, between: Callable[[], None]) -> int:
    root = os.path.realpath(allowed, strict=True)
    real = os.path.realpath(os.path.join(root, path))
    parts = Path(real).relative_to(root).parts  # ValueError: outside
    if not parts:
        raise _Refused("the folder itself")
    between()
    folder = os.open(root, _WALK)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _WALK, dir_fd=folder)
            os.close(folder)
            folder = inner
        # First what it is, then opened for reading: opening a device can do something already.
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            raise _Refused("not a regular file")
        fd = os.open(parts[-1], _READ, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _Refused("not a regular file any more")
    return fd
