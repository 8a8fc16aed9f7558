"""Asks the kernel to back weights by huge pages. Knows addresses, no tensors of a model.

Decoding reads every weight once per step; with 4 KiB pages about a sixth of that time goes into
address translation. Purely advice: where the kernel or the C library has none of it, nothing changes.
"""

from __future__ import annotations

import ctypes
import sys
import time

HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1; before that the kernel does it by and by, in the background


class HugePages:
    """Takes address ranges until ``budget_s`` seconds are spent collapsing their pages."""

    def __init__(self, budget_s: float) -> None:
        self._deadline_s = time.monotonic() + budget_s
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None) if _is_linux() else None
        self.num_collapsed = 0

    def advise(self, address: int, num_bytes: int) -> None:
        """Back a range, widened to whole huge pages, by such; neighbours there are unharmed."""
        if self._madvise is None or not num_bytes:
            return
        first = address // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        end = -(-(address + num_bytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        for page in range(first, end, HUGE_PAGE_BYTES):
            # Refused (EINVAL, ENOMEM) where a part of the page is not mapped: it stays as it is.
            if self._call(page, _MADV_HUGEPAGE) and time.monotonic() < self._deadline_s:
                self.num_collapsed += self._call(page, _MADV_COLLAPSE)

    def _call(self, page: int, advice: int) -> bool:
        assert self._madvise is not None  # checked by the caller
        done: int = self._madvise(
            ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE_BYTES), ctypes.c_int(advice)
        )
        return done == 0


def _is_linux() -> bool:
    return sys.platform == "linux"
