"""What images and files of embeddings cost, and whether text streams notice them.

::

    .venv/bin/python -m benchmarks.images                        # all cells, about 6 minutes
    .venv/bin/python -m benchmarks.images embeddings --rounds 15
    .venv/bin/python -m benchmarks.images streams --engine sim

* embeddings: one request at a time, in turns: a prompt of text, and one as long whose tokens stand for a
  64 MiB file of embeddings. The difference of their times to the first token is what the file adds.
  Beside it, in the same rounds: reading the file into memory, and copying it once. The model (torch engine)
  has one layer and rows of 8,192 values, so that computing takes little of the time.
* streams: 32 text streams, alone; with 100 image requests always in flight, of 128 tokens each; and, to tell
  what is the images' own, with 100 text requests as long as those. Every image is another one, 640 × 480.
  Gaps between tokens as the client sees them. ``--engine sim`` (steps of 20 ms that cost no CPU) shows what loading,
  decoding and planes do to streams; torch shows a real model, whose prompts and towers share the cores
  with the streams.

The load generator and everything measured share the machine. Needs gcc.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.disaggregated import Deployment, deployed
from benchmarks.serving import build_loadgen

MIB = 1 << 20
STREAMS = 32
IN_FLIGHT = 100
STREAM_TOKENS = 250
BESIDE_TOKENS = 128
STEP_MS = 20
SIM_COST = f"prefill:\n  per_token_us: 20\ndecode:\n  base_ms: {STEP_MS}\n"


# --- embeddings ----------------------------------------------------------------------------------


def make_wide_model(folder: Path, width: int, max_positions: int) -> Path:
    """Write a Qwen2-VL whose rows are ``width`` values wide, and whose one layer computes little."""
    import torch
    from safetensors.torch import load_file, save_file

    from trtllm_workers.demo.vision import write_vision_model

    write_vision_model(folder, "qwen2_vl")
    config = json.loads((folder / "config.json").read_text())
    head_dim = inner = 16
    config |= {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
    }
    config["vision_config"]["hidden_size"] = width
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul_(0.5 * float(shape[-1]) ** -0.5)

    small = load_file(folder / "model.safetensors")
    vocab = small["lm_head.weight"].shape[0]
    weights = {name: one for name, one in small.items() if name.startswith("visual.")}
    last = "visual.merger.mlp.2"
    weights[f"{last}.weight"] = noise(width, weights[f"{last}.weight"].shape[1])
    weights[f"{last}.bias"] = torch.zeros(width)
    layer = "model.layers.0"
    for name in ("q", "k", "v"):
        weights[f"{layer}.self_attn.{name}_proj.weight"] = noise(head_dim, width)
        weights[f"{layer}.self_attn.{name}_proj.bias"] = torch.zeros(head_dim)
    weights |= {
        f"{layer}.self_attn.o_proj.weight": noise(width, head_dim),
        f"{layer}.mlp.gate_proj.weight": noise(inner, width),
        f"{layer}.mlp.up_proj.weight": noise(inner, width),
        f"{layer}.mlp.down_proj.weight": noise(width, inner),
        f"{layer}.input_layernorm.weight": torch.ones(width),
        f"{layer}.post_attention_layernorm.weight": torch.ones(width),
        "model.norm.weight": torch.ones(width),
        "model.embed_tokens.weight": noise(vocab, width),
        "lm_head.weight": noise(vocab, width),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def write_embeddings(path: Path, num_tokens: int, width: int, seed: int) -> Path:
    """Write random float32 embeddings of one image, as ``trtllm-launch embed`` lays them out."""
    import torch
    from safetensors.torch import save_file

    rows = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    height = 1 << (num_tokens.bit_length() // 2)
    grid = torch.tensor([[1, 2 * height, 2 * (num_tokens // height)]])  # before patches are merged
    save_file({"mm_embeddings": rows, "image_grid_thw": grid}, path)
    return path


def first_token_s(port: int, body: dict[str, Any]) -> float:
    """Return the seconds from the request sent to the first content byte."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        content = json.dumps(body)
        began = time.perf_counter()
        connection.request(
            "POST", "/v1/chat/completions", content, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        seen = b""
        while line := answer.readline():
            seen += line
            if b'"content":"' in line and b'"content":""' not in line:
                took_s = time.perf_counter() - began
                answer.read()
                return took_s
        raise SystemExit(f"HTTP {answer.status} without a token: {seen.decode()[:500]}")
    finally:
        connection.close()


def ask(content: Any, max_tokens: int, **more: Any) -> dict[str, Any]:
    """Return a greedy, streamed chat of one message."""
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **more,
    }


def read_and_copy_s(path: Path, size: int) -> tuple[float, float]:
    """Return the seconds of reading a file from the page cache, and of one copy, in touched memory."""
    first, second = bytearray(size), bytearray(size)
    source, target = memoryview(first), memoryview(second)
    target[:] = source
    with path.open("rb", buffering=0) as file:
        began = time.perf_counter()
        done = 0
        while count := file.readinto(source[done:]):
            done += count
        read_s = time.perf_counter() - began
    began = time.perf_counter()
    target[:] = source
    return read_s, time.perf_counter() - began


def embeddings(folder: Path, rounds: int, size_mib: int) -> None:
    """Print what a file of embeddings adds to the time to the first token."""
    width, size = 8192, size_mib * MIB
    num_tokens = size // (width * 4)
    model = make_wide_model(folder / "wide", width, 4 * num_tokens)
    files = [
        write_embeddings(folder / f"{number}.safetensors", num_tokens, width, seed=number)
        for number in range(rounds + 1)
    ]
    options = ["--engine", "torch", "--model-path", str(model)]
    options += ["--allowed-local-media-path", str(folder), "--max-file-size-mb", str(2 * size_mib)]
    # Memory that has its pages; what lies beyond the first 256 MiB gets them when it is first used.
    options += ["--media-cache-mb", str(max(256, 2 * size_mib))]
    options += ["--set", f"max_num_tokens={2 * num_tokens}"]
    options += ["--set", f"kv_cache_config.max_tokens={8 * num_tokens}"]
    options += ["--set", "kv_cache_config.enable_block_reuse=false"]
    added, reads, copies, texts = [], [], [], []
    with deployed("aggregated", folder, options) as one:
        wanted = _tokens_of(one, [_image(files[0])])
        words = _words(one, wanted)
        lengths = _tokens_of(one, words), wanted
        for number, file in enumerate(files):
            text_s = first_token_s(one.port, ask(words[number:] + words[:number], 1))
            file_s = first_token_s(one.port, ask([_image(file)], 1))
            read_s, copy_s = read_and_copy_s(file, file.stat().st_size)
            if number:  # the first round touches pages and code
                texts.append(text_s)
                added.append(file_s - text_s)
                reads.append(read_s)
                copies.append(copy_s)
    middle = {name: statistics.median(values) * 1e3 for name, values in
              (("text", texts), ("added", added), ("read", reads), ("copy", copies))}  # fmt: skip
    limit = middle["read"] + middle["copy"]
    print(
        f"| {size_mib} MiB of embeddings, {num_tokens} tokens, {rounds} rounds | |\n| --- | --- |"
    )
    print(
        f"| prompt of text, {lengths[0]} tokens (with the file {lengths[1]}): TTFT | {middle['text']:.1f} ms |"
    )
    print(
        f"| the file adds | {middle['added']:.1f} ms ({min(added) * 1e3:.1f}–{max(added) * 1e3:.1f}) |"
    )
    print(f"| reading it, copying it | {middle['read']:.1f} ms, {middle['copy']:.1f} ms |")
    print(f"| added / (read + copy), aim ≤ 1.5 | {middle['added'] / limit:.2f} |", flush=True)


def _image(file: Path) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": str(file)}}


def _words(one: Deployment, num_tokens: int) -> str:
    """Return a text of about so many tokens, template included, of all kinds: they are looked up too."""
    dice, letters = random.Random(1), "abcdefghijklmnopqrstuvwxyz"
    some = ["".join(dice.choices(letters, k=3)) + " " for _ in range(num_tokens)]
    count, step = 0, 1 << 12
    while step := step // 2:
        if (
            count + step < len(some)
            and _tokens_of(one, "".join(some[: count + step])) <= num_tokens
        ):
            count += step
    return "".join(some[:count])


def _tokens_of(one: Deployment, content: Any) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=120)
    try:
        body = {**ask(content, 1), "stream": False}
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return int(json.loads(connection.getresponse().read())["usage"]["prompt_tokens"])
    finally:
        connection.close()


# --- streams -------------------------------------------------------------------------------------


def noise_url(dice: random.Random) -> str:
    """Return a JPEG of 640 × 480 that no other one equals, as a data: URL."""
    from PIL import Image

    small = Image.frombytes("RGB", (80, 60), dice.randbytes(80 * 60 * 3))
    out = io.BytesIO()
    small.resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def write_bodies(path: Path, bodies: list[dict[str, Any]]) -> Path:
    """Write one body a line, as the load generator takes them."""
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def streams(folder: Path, engine: str, rounds: int, options: list[str], name: str) -> None:
    """Print the gaps between tokens of text streams, with and without images beside them."""
    loadgen = build_loadgen(folder)
    model = folder / "vision"
    if not model.exists():
        command = [sys.executable, "-m", "trtllm_workers.demo.vision", "--family", "qwen2_vl"]
        subprocess.run([*command, "--out", str(model)], check=True, timeout=120)
    dice = random.Random(5)
    more = {"stream_options": {"include_usage": True}}
    text = write_bodies(
        folder / "text.jsonl",
        [ask(f"[{number}] tell me", STREAM_TOKENS, **more) for number in range(500)],
    )
    pictures = [{"type": "image_url", "image_url": {"url": noise_url(dice)}} for _ in range(600)]
    images = write_bodies(
        folder / "images.jsonl", [ask([one], BESIDE_TOKENS, **more) for one in pictures]
    )
    options = ["--engine", engine, "--model-path", str(model), *options]
    options += ["--set", "max_batch_size=256", "--set", "kv_cache_config.max_tokens=200000"]
    if engine == "sim":
        cost = folder / "cost.yaml"
        cost.write_text(SIM_COST)
        options += ["--sim-cost-model", str(cost)]
    seen: dict[str, list[tuple[float, float, float]]] = {"alone": [], "text": [], "images": []}
    with deployed("aggregated", folder, options) as one, ExitStack():
        num_tokens = _tokens_of(one, [pictures[0]])
        longer = [
            ask(f"[{number}]" + " a" * max(1, num_tokens - 20), BESIDE_TOKENS, **more)
            for number in range(600)
        ]
        beside = {
            "alone": None,
            "text": write_bodies(folder / "long.jsonl", longer),
            "images": images,
        }
        for number in range(rounds + 1):
            for kind, bodies in beside.items():
                gaps = _gaps(loadgen, one.port, text, bodies)
                if number:
                    seen[kind].append(gaps)
    base = statistics.median(p99 for _, p99, _ in seen["alone"])
    print(
        f"\n{name}: {STREAMS} text streams; an image is {num_tokens} tokens; {rounds} rounds, medians"
    )
    print(
        "| beside them | gap p50 | gap p99 | p99 over alone | requests/s |\n| --- | --- | --- | --- | --- |"
    )
    for kind, found in seen.items():
        p50, p99, rate = (statistics.median(one[at] for one in found) for at in range(3))
        label = "nothing" if kind == "alone" else f"{IN_FLIGHT} {kind} requests"
        print(
            f"| {label} | {p50:.2f} ms | {p99:.2f} ms | {p99 / base:.2f} | {rate:.0f} |", flush=True
        )


def _gaps(loadgen: Path, port: int, text: Path, beside: Path | None) -> tuple[float, float, float]:
    """Return p50 and p99 of the gaps in milliseconds, and requests per second beside the streams."""
    common = [str(loadgen), "-p", str(port), "-w", "0", "-t", "120"]
    other = None
    if beside is not None:
        # One after the other, or all would begin again at the same time, again and again.
        argv = [*common, "-b", str(beside), "-c", str(IN_FLIGHT), "-d", "10", "-R", "2500"]
        other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        time.sleep(3)  # until they are all in flight
    try:
        argv = [*common, "-b", str(text), "-c", str(STREAMS), "-n", str(STREAMS)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=180)
        measured = json.loads(done.stdout)
        if measured["errors"]:
            raise SystemExit(f"streams failed: {measured}")
        rate = 0.0
        if other is not None:
            told = json.loads(other.communicate(timeout=180)[0])
            if told["errors"]:
                raise SystemExit(f"requests beside the streams failed: {told}")
            rate = float(told["req_s"])
        return measured["itl_ms"]["p50"], measured["itl_ms"]["p99"], rate
    finally:
        if other is not None and other.poll() is None:
            other.kill()


def main() -> None:
    """Parse the arguments and run the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", choices=["embeddings", "streams", []], default=[])
    parser.add_argument("--engine", choices=["sim", "torch"], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=64)
    args = parser.parse_args()
    cells = args.cells or ["embeddings", "streams"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "embeddings" in cells:
            embeddings(folder, args.rounds, args.size_mib)
        if "streams" in cells:
            apart = ["--num-encode-workers", "1"]
            for engine in args.engine or ["sim", "torch"]:
                streams(folder, engine, args.rounds, [], f"{engine}, aggregated")
                streams(folder, engine, args.rounds, apart, f"{engine}, with an encode worker")
    os.sync()


if __name__ == "__main__":
    main()
