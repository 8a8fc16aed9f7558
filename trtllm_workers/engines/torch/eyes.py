"""From a model folder to its vision tower alone, for an engine that only encodes. Reads no other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.torch.loading import load_vision, make_plan
from trtllm_workers.engines.torch.ranks import ALONE
from trtllm_workers.engines.torch.vision.loading import Vision
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.types import EngineInfo

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Eyes:
    """What an engine that only encodes has. ``block_size`` is what its language model would have."""

    vision: Vision
    info: EngineInfo


def load_eyes(
    folder: Path,
    config: EngineConfig,
    on_progress: Callable[[float], None],
    media: MediaSettings,
) -> Eyes:
    """Load a model's vision tower alone. Raises ConfigError for what the operator can mend."""
    plan = make_plan(folder, config, ALONE)
    model = plan.model_config.vision
    if model is None:
        raise ConfigError(
            f"{folder}: this model takes text only, so there is nothing to encode; give role encode a "
            "model of images and text",
            param="model_path",
        )
    vision = load_vision(folder, plan, media, True, on_progress)
    assert vision is not None  # as there is a model of it
    info = EngineInfo(
        engine="torch",
        model_path=str(folder),
        model_id=plan.model_id,
        block_size=config["kv_cache_config.tokens_per_block"],
        num_blocks=0,
        max_seq_len=plan.max_seq_len,
        max_batch_size=0,
        max_num_tokens=0,
        vocab_size=plan.model_config.vocab_size,
        eos_token_ids=plan.model_config.eos_token_ids,
        device=str(plan.device),
        dtype=vision.info.dtype,
        tensor_parallel_size=1,
        vision=vision.info,
    )
    log.info("vision tower loaded", model=info.model_id, device=info.device, dtype=info.dtype)
    return Eyes(vision, info)
