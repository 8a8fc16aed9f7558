"""What a disaggregated run asks of settings and of the engine configs of its two roles. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trtllm_workers.config.disaggregation_options import DISAGGREGATION_OPTIONS
from trtllm_workers.config.engine_config import shown_value
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.layers import Layers, file_problem
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.config.values import shown
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

_SHIPPED = {"prefill_engine_config": "prefill.yaml", "decode_engine_config": "decode.yaml"}
_DEVICES = ("prefill_cuda_visible_devices", "decode_cuda_visible_devices")
# Only aggregated workers have these.
_AGGREGATED = {
    "engine_config": "the run is disaggregated; its roles have --prefill-engine-config and "
    "--decode-engine-config",
    "num_workers": "the run is disaggregated; its roles have --num-prefill-workers and "
    "--num-decode-workers",
}
# Embeddings of images travel in aggregated runs as well.
_OF_EVERY_RUN = ("disaggregated", "kv_transport")
# A block is copied byte for byte, so what decides its bytes must be one and the same.
_SAME = ("kv_cache_config.tokens_per_block", "kv_cache_config.dtype", "dtype")


def settle_disaggregation(layers: Layers, *, of_one_part: bool) -> None:
    """Fill in and check the options of a disaggregated run; warn of those without effect.

    ``of_one_part``: the process is a part of a run that somebody else describes.
    """
    values = layers.values
    for name, file in _SHIPPED.items():
        layers.default(name, shipped_engine_config(file))
    if not values["disaggregated"] and not of_one_part:
        for option in DISAGGREGATION_OPTIONS:
            if option.name not in _OF_EVERY_RUN and layers.given(option.name):
                layers.warnings.append(
                    f"{layers.sources[option.name]} has no effect without --disaggregated"
                )
        return
    if values["disaggregated"]:
        for name, why in _AGGREGATED.items():
            if layers.given(name):
                layers.warnings.append(f"{layers.sources[name]} has no effect: {why}")
        for name in _SHIPPED:
            if wrong := file_problem(values[name]):
                layers.fail(name, wrong)
    for name in _DEVICES:
        if values[name] is not None:
            settle_devices(layers, name)
    _settle_timeouts(layers)
    _settle_queue(layers)


def _settle_queue(layers: Layers) -> None:
    values, sources = layers.values, layers.sources
    if values["prefill_dispatch"] != "queue":
        if layers.given("max_prefill_queue_size"):
            source = sources["max_prefill_queue_size"]
            layers.warnings.append(f"{source} has no effect without --prefill-dispatch queue")
    elif values["strategy"] == "prefill_first":
        layers.fail(
            "prefill_dispatch",
            f"queue needs --strategy decode_first, but it is prefill_first ({sources['strategy']}): "
            "whoever decodes puts prompts into the queue; take one of the two back",
        )


def settle_devices(layers: Layers, name: str) -> None:
    """Check a list of GPUs, and drop the spaces in it."""
    text = layers.values[name]
    devices = [one.strip() for one in text.split(",")]
    if not all(devices) or any(" " in one for one in devices):
        layers.fail(
            name, f"must be devices with commas between, for example 0,1, not {shown(text)}"
        )
    elif len(set(devices)) < len(devices):
        layers.fail(name, f"names a device twice: {shown(text)}")
    else:
        layers.values[name] = ",".join(devices)


def _settle_timeouts(layers: Layers) -> None:
    least, most = (layers.values[f"handoff_{end}_timeout_s"] for end in ("min", "max"))
    if least <= most:
        return
    if layers.given("handoff_max_timeout_s"):
        text = f"must be --handoff-min-timeout-s ({least:g}) or more, not {most:g}"
        layers.fail("handoff_max_timeout_s", text)
    else:
        text = f"must be --handoff-max-timeout-s ({most:g}) or less, not {least:g}"
        layers.fail("handoff_min_timeout_s", text)


def require_same_blocks(prefill: EngineConfig, decode: EngineConfig) -> None:
    """Raise ConfigError, naming both values and places, where KV blocks of the two would differ."""
    if lines := _differences(_SAME, (Role.PREFILL, prefill), (Role.DECODE, decode)):
        raise ConfigError(
            "\n".join(
                [
                    "prefill and decode workers exchange KV blocks byte for byte, but differ:",
                    *lines,
                    "give both the same value; --set KEY=VALUE sets it for both",
                ]
            ),
            param="decode_engine_config",
        )


def require_same_rows(configs: Mapping[Role, EngineConfig]) -> None:
    """Raise ConfigError, naming values and places, where embeddings would be read in another dtype."""
    if Role.ENCODE not in configs:
        return
    encode = (Role.ENCODE, configs[Role.ENCODE])
    others = [one for one in configs.items() if one[0] is not Role.ENCODE]
    if lines := [line for other in others for line in _differences(("dtype",), encode, other)]:
        raise ConfigError(
            "\n".join(
                [
                    "encode workers hand embeddings over as they are, but differ from who takes them:",
                    *lines,
                    "give all the same value; --set dtype=VALUE sets it for all",
                ]
            ),
            param="encode_engine_config",
        )


def _differences(
    keys: Sequence[str], one: tuple[Role, EngineConfig], other: tuple[Role, EngineConfig]
) -> list[str]:
    lines = []
    for key in keys:
        if any(key not in config.settings for _, config in (one, other)):
            continue
        if one[1][key] != other[1][key]:
            says = [
                f"{shown_value(config[key])} ({config.source(key)}) for {role}"
                for role, config in (one, other)
            ]
            lines.append(f"{key} is {' and '.join(says)}")
    return lines
