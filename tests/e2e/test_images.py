"""Images and embeddings in real processes: the same tokens however they are served, and what dies."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.harness import Workbench
from tests.e2e.images import (
    FAMILIES,
    ask,
    chat,
    data_url,
    picture,
    text_of,
    web_server,
    write_pictures,
)
from tests.e2e.parts import Parts

VisionModel = Callable[[str], Path]
SERVED = ("--served-model-name", "seer")
EPD = ("--disaggregated", "--num-encode-workers", "1")
KINDS: dict[str, list[tuple[str, ...]]] = {
    "llava": [EPD],
    "qwen2_5_vl": [(*EPD, "--strategy", "prefill_first")],
    "qwen2_vl": [
        ("--disaggregated", "--strategy", "decode_first"),
        ("--disaggregated", "--strategy", "prefill_first"),
        ("--num-encode-workers", "1"),
        (*EPD, "--strategy", "decode_first", "--kv-transport", "nixl"),
        (*EPD, "--strategy", "prefill_first", "--kv-transport", "tcp"),
        (*EPD, "--kv-transport", "ucx", "--max-local-prefill-length", "4096"),
    ],
}


def start(bench: Workbench, model: Path, *options: str, **environ: str) -> tuple[Any, str]:
    return bench.up(
        *("--engine", "torch", "--model-path", str(model), *SERVED),
        *("--allowed-local-media-path", str(bench.path)),
        *options,
        **environ,
    )


def fetches(parts: Parts) -> bool:
    """Whether a worker has taken embeddings from another one."""
    return parts.metric("media_fetch_bytes_total") > 0


@pytest.fixture
def pictures(bench: Workbench) -> list[Path]:
    return write_pictures(bench.path, 4)


def bodies_about(pictures: list[Path]) -> list[dict[str, Any]]:
    first, second, third, _ = map(str, pictures)
    return [
        chat("seer", "What is this?", first),
        chat("seer", first, "And this?", second, "Which is larger?"),
        chat("seer", "A long question comes first. " * 30, third, "What was it?"),
        chat("seer", "What is this?", data_url(picture(9))),
        chat("seer", "No image at all."),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_an_aggregated_worker(
    bench: Workbench, vision_model: VisionModel, pictures: list[Path], family: str
) -> None:
    """Twice, the second time from prefix caches, all requests at once."""
    model = vision_model(family)
    bodies = bodies_about(pictures)
    run, url = start(bench, model)
    expected = [text_of(url, body) for body in bodies]
    assert len(set(expected)) == len(expected), "the answers do not depend on the images"
    run.signal(signal.SIGINT)
    run.wait_end()
    for options in KINDS[family]:
        run, url = start(bench, model, *options)
        for _round in range(2):
            with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
                answers = list(pool.map(partial(text_of, url), bodies))
            assert answers == expected, options
        parts = Parts(bench)
        parts.url = url
        assert parts.metric("prefill_fallbacks_total") == 0
        if "--num-encode-workers" in options:
            parts.wait(partial(fetches, parts), "fetched")
        parts.wait_no_block_held()
        run.signal(signal.SIGINT)
        run.wait_end()
    bench.wait_empty()


def test_a_file_of_embeddings_gives_the_tokens_of_its_image(
    bench: Workbench, vision_model: VisionModel, pictures: list[Path]
) -> None:
    model = vision_model("qwen2_vl")
    files = []
    for path in pictures[:2]:
        made = path.with_suffix(".safetensors")
        embed = bench.run("embed", "--model", str(model), str(path), "-o", str(made))
        assert embed.popen.returncode == 0, embed.output
        files.append(made)
    _, url = start(bench, model, *EPD)
    for image, file in zip(pictures, files, strict=False):
        seen = ask(url, chat("seer", "What is this?", str(image))).json()
        told = ask(url, chat("seer", "What is this?", file.as_uri())).json()
        assert seen["choices"][0]["message"] == told["choices"][0]["message"]
        assert seen["usage"] == told["usage"]
    mixed = chat("seer", str(pictures[0]), "and", str(files[1]))
    both = chat("seer", str(pictures[0]), "and", str(pictures[1]))
    assert text_of(url, mixed) == text_of(url, both)


def test_the_openai_client_streams_about_images_from_the_web(
    bench: Workbench, vision_model: VisionModel
) -> None:
    with web_server({"/cat.png": picture(3)}) as host:
        _, url = start(bench, vision_model("llava"), "--media-url-host", host)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        body = chat("seer", "What is this?", f"http://{host}/cat.png?size=large")
        with client.chat.completions.create(
            **body_of(body), stream=True, stream_options={"include_usage": True}
        ) as stream:
            events = list(stream)
        text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
        assert text == text_of(url, chat("seer", "What is this?", data_url(picture(3))))
        assert events[-1].usage is not None
        alone = ask(url, chat("seer", "What is this?")).json()["usage"]["prompt_tokens"]
        assert events[-1].usage.prompt_tokens > alone + 4
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                **body_of(chat("seer", "And this?", f"http://{host}/dog.png"))
            )
        assert refused.value.param == "messages[0].content[1].image_url"


def body_of(body: dict[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in body.items() if key != "ignore_eos"}
    return {**known, "extra_body": {"ignore_eos": body["ignore_eos"]}}


def test_what_may_not_be_read_is_refused_alike(
    bench: Workbench, vision_model: VisionModel, pictures: list[Path], tmp_path: Path
) -> None:
    """A client learns nothing about files outside, and everything about its own mistake."""
    secret = bench.path.parent / f"{bench.path.name}-secret.png"
    secret.write_bytes(picture(1))
    link = bench.path / "link.png"
    link.symlink_to(secret)
    try:
        _, url = start(bench, vision_model("llava"))
        outside = [
            str(secret),
            f"{bench.path}/../{secret.name}",
            str(link),
            "/etc/shadow.png",
            "/does/not/exist.png",
            str(bench.path / "no.png"),
            "file:///etc/passwd",
        ]
        said = [ask(url, chat("seer", "?", reference)) for reference in outside]
        assert {answer.status_code for answer in said} == {400}
        words = {answer.json()["error"]["message"] for answer in said}
        assert len(words) == 1, words
        assert str(bench.path) not in words.pop()
        for reference in (
            "http://169.254.169.254/latest/meta-data",
            "http://127.0.0.1:22/x.png",
            "http://[::ffff:127.0.0.1]/x.png",
            "ftp://example.com/x.png",
            "gopher://localhost/x",
            str(bench.path / "model.pt"),
        ):
            assert ask(url, chat("seer", "?", reference)).status_code == 400, reference
        assert text_of(url, chat("seer", "?", str(pictures[0])))
    finally:
        secret.unlink()


def test_a_text_model_refuses_images(served: str) -> None:
    answer = ask(served, chat("demo", "What is this?", data_url(picture(1))))
    if answer.status_code == 404:
        name = httpx.get(f"{served}/v1/models").json()["data"][0]["id"]
        answer = ask(served, chat(name, "What is this?", data_url(picture(1))))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "messages[0].content[1].image_url"
    assert "takes text only" in error["message"]


def test_a_dead_encode_worker_is_replaced_by_the_next(
    bench: Workbench, vision_model: VisionModel, pictures: list[Path]
) -> None:
    _, url = start(bench, vision_model("qwen2_vl"), "--disaggregated", "--num-encode-workers", "2")
    bodies = [chat("seer", "What is this?", str(path)) for path in pictures]
    expected = [text_of(url, body) for body in bodies]
    stop = False

    def keep_asking(body: dict[str, Any]) -> list[str]:
        seen = []
        for number in range(30):
            seen.append(text_of(url, {**body, "seed": number}))
            if stop:
                break
        return seen

    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        asking = [pool.submit(keep_asking, body) for body in bodies]
        for name in ("encode-0", "encode-1"):
            os.kill(bench.pid_of(name), signal.SIGKILL)
            bench.started[0].wait_line(rf"{name} is ready again")
        stop = True
        for future, text in zip(asking, expected, strict=True):
            assert set(future.result(60)) == {text}


def test_without_an_encode_worker_text_goes_on(
    bench: Workbench, vision_model: VisionModel, pictures: list[Path]
) -> None:
    common = ("--engine", "torch", "--model-path", str(vision_model("qwen2_vl")), *SERVED)
    parts = Parts(bench, *common, "--allowed-local-media-path", str(bench.path))
    url = parts.ingress()
    parts.worker("aggregated", "maker", "--encodes", "off")
    encoder = parts.worker("encode", "encoder")
    about = chat("seer", "Hello", str(pictures[0]))
    parts.wait(lambda: ask(url, about).status_code == 200, "encoding")
    encoder.signal(signal.SIGKILL)
    parts.wait(lambda: ask(url, about).status_code == 503, "without an encode worker")
    assert "no encode worker" in ask(url, about).json()["error"]["message"]
    assert text_of(url, chat("seer", "Hello"))
    parts.worker("encode", "another")
    parts.wait(lambda: ask(url, about).status_code == 200, "encoding again")
