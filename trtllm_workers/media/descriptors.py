"""File descriptors with an owner, and files that live in memory only. Needs Linux."""

from __future__ import annotations

import fcntl
import os

_NAME = "trtllm-launch-media"  # shown in /proc only


class Descriptor:
    """An open file, closed by ``close`` (safe twice) or at the end of a ``with``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def num_bytes(self) -> int:
        """How long the file is now."""
        return os.fstat(self.fd).st_size

    def write(self, piece: bytes | memoryview) -> None:
        """Append ``piece``."""
        left = memoryview(piece)
        while left:
            left = left[os.write(self.fd, left) :]

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give it back to the system."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def in_memory() -> Descriptor:
    """Return an empty file in memory."""
    return Descriptor(os.memfd_create(_NAME, os.MFD_CLOEXEC))


def room_in_memory(num_bytes: int) -> Descriptor:
    """Return a file of ``num_bytes`` zeros in memory, whose size nobody can change any more.

    So whoever maps it need not fear that another process cuts it off. Pages are taken when written.
    """
    file = Descriptor(os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(file.fd, num_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        file.close()
        raise
    return file
