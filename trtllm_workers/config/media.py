"""What a worker may read and fetch for images, as one value. Reads no environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """Limits of everything that a request's images can make a worker do.

    * ``allowed_local_path``: local files are read only under it, by their real path; None: none are.
    * ``max_file_bytes``: larger files, responses and ``data:`` URLs are refused before they are read.
    * ``max_pixels``: images with more (width × height) are refused before they are decoded.
    * ``url_hosts``: the only hosts (``host`` or ``host:port``) that are fetched from, private ones
      included; (): any, at public addresses. Link-local addresses, where clouds keep credentials, never.
    * ``allow_pickle``: whether .pt, .pth and .bin files are opened at all.
    * ``timeout_s``: for loading one image or file, from wherever it comes.
    * ``max_items``: images in one request.
    * ``cache_bytes``: what is kept of images, those of running requests included.
    """

    allowed_local_path: Path | None = None
    max_file_bytes: int = 50 * MIB
    max_pixels: int = 1 << 25
    url_hosts: tuple[str, ...] = ()
    allow_pickle: bool = False
    timeout_s: float = 10.0
    max_items: int = 16
    cache_bytes: int = 1024 * MIB
