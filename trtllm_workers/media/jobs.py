"""What a worker and its sandboxed children say to each other. No behaviour.

A job comes with descriptors: its input, and for those that return bytes a file in memory for them. Every
job is answered by one reply. A child is not believed: replies hold numbers and fixed words only.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

MAX_MESSAGE_BYTES = 1 << 14

# Embeddings in pickled files become safetensors under this name, if they have none of their own.
UNNAMED = "embeddings"


class Kind(StrEnum):
    """What a child can do; it imports what that needs, once."""

    IMAGES = "images"
    PICKLES = "pickles"


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Tell an image's size from its header."""

    max_pixels: int
    cpu_s: float


class Decode(msgspec.Struct, frozen=True, tag="decode"):
    """Write an image's RGB bytes [height, width, 3], turned by an EXIF ``orientation``."""

    height: int
    width: int
    orientation: int
    max_pixels: int
    cpu_s: float


class Unpickle(msgspec.Struct, frozen=True, tag="unpickle"):
    """Write a pickled file's tensors as a .safetensors file of at most ``max_bytes``."""

    max_bytes: int
    cpu_s: float


Job = Look | Decode | Unpickle


class Why(StrEnum):
    """Why a child refuses what it was given."""

    ANIMATED = "animated"
    BROKEN = "broken"
    FORMAT = "format"
    MEMORY = "memory"
    NAMES = "names"
    PIXELS = "pixels"
    TENSORS = "tensors"
    TOO_LARGE = "too_large"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child waits for jobs."""


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The child cannot work here; why is for the log."""

    why: str


class Looked(msgspec.Struct, frozen=True, tag="looked"):
    """An image's size as it will be decoded, and how it is to be turned."""

    height: int
    width: int
    orientation: int


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    """The image is written."""


class Unpickled(msgspec.Struct, frozen=True, tag="unpickled"):
    """The tensors are written, as ``num_bytes`` of a .safetensors file."""

    num_bytes: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The job's input is not taken. ``details`` are for the log; ``size`` is an image's (height, width)."""

    why: Why
    details: str = ""
    size: tuple[int, int] = (0, 0)


Reply = Ready | Unusable | Looked | Decoded | Unpickled | Refused
