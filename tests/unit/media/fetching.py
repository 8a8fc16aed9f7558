"""What the tests of fetching share: names that resolve as a test likes, and what a fetch gave or was refused for."""

from __future__ import annotations

import pytest

from tests.unit.media.support import PARAM
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.urls import Fetcher, Resolve

LOCAL = MediaSettings(url_hosts=("127.0.0.1", "localhost"), timeout_s=5.0, max_file_bytes=10_000)


def names(**hosts: str) -> Resolve:
    """Resolve names as given: addresses separated by spaces; every call counts."""

    async def resolve(host: str, _port: int) -> list[str]:
        if host not in hosts:
            raise OSError("Name or service not known")
        return hosts[host].split()

    return resolve


async def fetched(url: str, settings: MediaSettings = LOCAL, **options: object) -> bytes:
    pieces: list[bytes] = []
    fetcher = Fetcher(settings, **options)  # type: ignore[arg-type]
    count = await fetcher.fetch(url, PARAM, pieces.append)
    body = b"".join(pieces)
    assert count == len(body)
    return body


async def refused(url: str, settings: MediaSettings = LOCAL, **options: object) -> str:
    with pytest.raises(MediaRejected) as caught:
        await fetched(url, settings, **options)
    assert caught.value.param == PARAM
    for secret in ("169.254", "127.0.0.1", "10.0.0", "Errno", "refused"):
        assert secret not in str(caught.value)
    return str(caught.value)
