"""Pictures, servers that give them, and chats about them. Holds no test."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")


def picture(seed: int, width: int = 60, height: int = 44) -> bytes:
    """Return a PNG that differs for every seed."""
    pixels = bytes((seed * 37 + x * (seed + 3) + y * 7 + c * 91) % 256
                   for y in range(height) for x in range(width) for c in range(3))  # fmt: skip
    out = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def chat(model: str, *parts: str, max_tokens: int = 12, **more: Any) -> dict[str, Any]:
    """Return a greedy chat body: words as text, whatever looks like a reference as an image."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if part.startswith(("data:", "http:", "https:", "file:", "ftp:", "gopher:", "/")):
            content.append({"type": "image_url", "image_url": {"url": part}})
        else:
            content.append({"type": "text", "text": part})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **more,
    }


def ask(url: str, body: Mapping[str, Any], timeout_s: float = 60) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout_s)


def text_of(url: str, body: Mapping[str, Any]) -> str:
    answer = ask(url, body)
    assert answer.status_code == 200, answer.text
    content = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


@contextlib.contextmanager
def web_server(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve files by path on a loopback port; yields ``host:port``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.partition("?")[0])
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Write PNGs of different sizes."""
    paths = [folder / f"picture-{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number, 40 + 24 * number, 52 + 16 * number))
    return paths
