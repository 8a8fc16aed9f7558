"""What a reference in a request is: read once, here, from its text alone. Touches no file and no network."""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from enum import StrEnum
from posixpath import splitext
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from trtllm_workers.errors import MediaRejected
from trtllm_workers.types import MediaReference

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin")
EMBEDDINGS = (*PICKLES, SAFETENSORS)

_LONGEST_URL = 8192
_LONGEST_PATH = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_DATA = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)
# Base64 is decoded in pieces, so that no other thread waits long for the interpreter.
_PIECE = 1 << 20


class Place(StrEnum):
    """Where the bytes of a reference are."""

    URL = "url"
    DATA = "data"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference, read. ``where`` is an http(s) URL, a local path, or the base64 text of a ``data:`` URL.

    ``suffix`` is that of a file of embeddings, lower case; "" means an image.
    """

    place: Place
    where: str
    suffix: str
    param: str


def read_reference(reference: MediaReference) -> Reference:
    """Return what a reference names. Raises MediaRejected when it can name nothing that is taken."""
    url, param = reference.url, reference.param
    if not url:
        raise MediaRejected(f"{param}: an empty URL", param=param)
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    match scheme:
        case "":
            return _file(url, param)
        case "file":
            return _file(_path_of_file_url(url, param), param)
        case "data":
            return Reference(Place.DATA, _base64_of(url, param), "", param)
        case "http" | "https":
            if len(url) > _LONGEST_URL:
                raise MediaRejected(
                    f"{param}: a URL of more than {_LONGEST_URL} bytes", param=param
                )
            try:
                path = unquote(urlsplit(url).path)
            except ValueError as error:
                raise MediaRejected(f"{param}: this is not a valid URL", param=param) from error
            return Reference(Place.URL, url, _suffix(path), param)
    raise MediaRejected(
        f"{param}: URLs of this scheme are not taken; use http, https, data or file", param=param
    )


def decoded(text: str, param: str, max_bytes: int) -> bytes:
    """Return the bytes of a ``data:`` URL's base64 text. Raises MediaRejected for what is none, or too long."""
    if len(text) // 4 * 3 - 2 > max_bytes:
        raise MediaRejected(
            f"{param}: this data: URL holds more than the {max_bytes} bytes that are taken",
            param=param,
        )
    pieces: list[bytes] = []
    try:
        if len(text) % 4:
            raise ValueError("not padded")
        for at in range(0, len(text), _PIECE):
            piece = text[at : at + _PIECE]
            if "=" in piece and at + _PIECE < len(text) - 2:
                raise ValueError("padding before the end")
            pieces.append(binascii.a2b_base64(piece.encode("ascii"), strict_mode=True))
    except ValueError as error:
        raise MediaRejected(
            f"{param}: the data: URL is not valid base64 (standard alphabet, padded, no spaces)",
            param=param,
        ) from error
    return b"".join(pieces)


def _file(path: str, param: str) -> Reference:
    if "\0" in path or len(path) > _LONGEST_PATH:
        raise MediaRejected(f"{param}: this is not a valid path", param=param)
    return Reference(Place.FILE, path, _suffix(path), param)


def _path_of_file_url(url: str, param: str) -> str:
    try:
        parts = urlsplit(url)
        path = unquote_to_bytes(parts.path).decode("utf-8")
    except ValueError as error:
        raise MediaRejected(f"{param}: this is not a valid file: URL", param=param) from error
    if parts.netloc.lower() not in ("", "localhost") or not path.startswith("/"):
        raise MediaRejected(
            f"{param}: a file: URL names no host and a whole path: file:///folder/name", param=param
        )
    return path


def _base64_of(url: str, param: str) -> str:
    found = _DATA.match(url)
    options = found["options"].lower().split(";") if found else []
    if found is None or options[-1] != "base64":
        raise MediaRejected(
            f"{param}: a data: URL has the form data:image/png;base64,…", param=param
        )
    if not found["type"].lower().startswith("image/"):
        raise MediaRejected(
            f"{param}: a data: URL holds an image (image/png, image/jpeg, …); files of embeddings are "
            "named by URL or path",
            param=param,
        )
    return url[found.end() :]


def _suffix(path: str) -> str:
    suffix = splitext(path)[1].lower()
    return suffix if suffix in EMBEDDINGS else ""
