from __future__ import annotations

import base64
import os

import pytest

from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.references import Place, decoded, read_reference
from trtllm_workers.types import MediaReference

PARAM = "messages.0.content.1.image_url.url"


def place_of(url: str) -> tuple[Place, str, str]:
    found = read_reference(MediaReference(url, PARAM))
    assert found.param == PARAM
    return found.place, found.where, found.suffix


def refused(url: str) -> str:
    with pytest.raises(MediaRejected) as caught:
        read_reference(MediaReference(url, PARAM))
    assert caught.value.param == PARAM
    assert PARAM in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "suffix"),
    [
        ("https://a.example/x.pt", ".pt"),
        ("https://a.example/x.PT?sig=a.png#b.jpg", ".pt"),
        ("https://a.example/x.safetensors?versionId=3", ".safetensors"),
        ("https://a.example/x%2Ept", ".pt"),
        ("HTTP://a.example/x.bin", ".bin"),
        ("https://a.example/x.png?name=y.pt", ""),
        ("https://a.example/x.png#y.pt", ""),
        ("https://a.example/.pt", ""),
        ("https://a.example", ""),
    ],
)
def test_suffix_of_url_ignores_query_and_fragment(url: str, suffix: str) -> None:
    assert place_of(url) == (Place.URL, url, suffix)


@pytest.mark.parametrize(
    ("url", "path", "suffix"),
    [
        ("/data/x.pth", "/data/x.pth", ".pth"),
        ("x.png", "x.png", ""),
        ("folder/x.Safetensors", "folder/x.Safetensors", ".safetensors"),
        ("file:///data/x.pt", "/data/x.pt", ".pt"),
        ("file:///data/x.pt?version=1", "/data/x.pt", ".pt"),
        ("file://localhost/data/x.png", "/data/x.png", ""),
        ("FILE:///data/a%20b.bin", "/data/a b.bin", ".bin"),
        ("/data/a%20b.png", "/data/a%20b.png", ""),
    ],
)
def test_local_files(url: str, path: str, suffix: str) -> None:
    assert place_of(url) == (Place.FILE, path, suffix)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a.example/x.png",
        "gopher://a.example/",
        "s3://bucket/x.png",
        "javascript:alert(1)",
        "C:\\x.png",
        "/data/x\0.png",
        "/" + "a" * 5000,
        "https://a.example/" + "a" * 9000,
        "file://a.example/etc/passwd",
        "file://127.0.0.1/etc/passwd",
        "file:etc/passwd",
        "file:///data/x%00.png",
        "file:///data/%ff.png",
        "data:image/png,plain",
        "data:image/png;base64",
        "data:;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:application/octet-stream;base64,AAAA",
        "http://[::1/x.png",
    ],
)
def test_what_names_nothing_is_refused(url: str) -> None:
    refused(url)


def test_embeddings_in_a_data_url_are_told_how_to_come() -> None:
    assert "URL or path" in refused("data:application/octet-stream;base64,AAAA")


def test_data_url() -> None:
    content = os.urandom(3_000_001)
    for media_type in ("image/png", "IMAGE/JPEG;charset=x", "image/png;a=b"):
        url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        place, text, suffix = place_of(url)
        assert (place, suffix) == (Place.DATA, "")
        assert decoded(text, PARAM, len(content)) == content


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 786_431, 786_432, 786_433, 786_434, 1_572_864])
def test_base64_is_whole_at_the_seams_of_its_pieces(length: int) -> None:
    content = os.urandom(length)
    assert decoded(base64.b64encode(content).decode(), PARAM, 1 << 24) == content


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "AAA",
        "AA=A",
        "AAAA=",
        "A A=",
        "AA\nAA",
        "AÄ==",
        "AA==AAAA",
        "-_-_",
        "%zz",
        "AA%3D%3D",
        "A" * 1_048_574 + "==AAAA",
    ],
)
def test_bad_base64_is_refused(text: str) -> None:
    with pytest.raises(MediaRejected, match="base64"):
        decoded(text, PARAM, 1 << 24)


def test_a_data_url_that_is_too_long_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(MediaRejected, match="1000 bytes"):
        decoded("!" * 2000, PARAM, 1000)  # were it decoded, it would be called bad base64
    assert decoded(base64.b64encode(bytes(1000)).decode(), PARAM, 1000) == bytes(1000)
    with pytest.raises(MediaRejected):
        decoded(base64.b64encode(bytes(1003)).decode(), PARAM, 1000)
