"""The vision tower apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from trtllm_workers.config.vision_model import read_vision

from .._torch.shared_tensor import SharedTensorContainer
from ..executor.result import RequestOutput, Response
from ..inputs.eyes import Eyes
from .disaggregated_params import DisaggregatedParams
from .llm import check_arguments, require_gpus


class MultimodalEncoder:
    """Encodes what prompts show; the answer is a handle."""

    def __init__(
        self,
        model: str,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        **kwargs: Any,
    ) -> None:
        del trust_remote_code, dtype
        check_arguments(kwargs)
        require_gpus(tensor_parallel_size, kwargs.get("gpus_per_node"))
        if read_vision(Path(model)) is None:
            raise ValueError(f"{model} has no multimodal encoder")
        self._eyes = Eyes(Path(model))
        self._numbers = itertools.count(1)
        self._ended = False
        self.fake_error: BaseException | None = None

    def generate_async(self, inputs: Any, sampling_params: Any = None) -> RequestOutput:
        """Return at once."""
        del sampling_params
        if self._ended:
            raise RuntimeError("LLM is shutting down")
        if self.fake_error is not None:
            raise self.fake_error
        if not isinstance(inputs, dict) or not inputs.get("prompt"):
            raise ValueError("a text prompt is required")
        rows = [self._eyes.look(one) for one in inputs["multi_modal_data"]["image"]]
        handles = [SharedTensorContainer.from_tensor(one).dump_to_dict() for one in rows]
        output = RequestOutput(next(self._numbers), [], lambda _number: None)
        output.mm_embedding_handle = handles[0]
        params = DisaggregatedParams(multimodal_embedding_handles=handles)
        output.disaggregated_params = params
        output.put(Response(finish_reason="stop", disaggregated_params=params))
        return output

    def shutdown(self) -> None:
        """End; safe twice."""
        self._ended = True
