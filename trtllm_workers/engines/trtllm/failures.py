"""Whose failure it is: one request's, or the engine's. Pure."""

from __future__ import annotations

# Words in a RequestError that tell of the process rather than of the request: what comes after them
# fails as well, while the engine still calls itself healthy.
_FATAL = (
    "cuda error",
    "cuda runtime error",
    "cudaerror",
    "cublas",
    "illegal memory access",
    "nccl error",
    "unspecified launch failure",
    "device-side assert",
    "ecc error",
    "mpi_abort",
    "executor worker",
    "is shutting down",
    "has been shut down",
)
# So many failures in a row, of different requests and without any success, are looked into.
SUSPICIOUS_FAILURES = 8


def is_fatal(error: BaseException) -> bool:
    """Return whether an error that came with one request tells of a broken engine."""
    text = str(error).casefold()
    return any(words in text for words in _FATAL)


def in_words(error: BaseException) -> str:
    """Return an error on one line, with its type when the text alone says little."""
    text = " ".join(str(error).split())
    return text if len(text) > 20 else f"{type(error).__name__}: {text}"
