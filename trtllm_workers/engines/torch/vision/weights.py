"""Puts a checkpoint's weights into modules of transformers. Knows names and shapes, not what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from trtllm_workers.engines.torch.checkpoint import Checkpoint

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)

# transformers 5 left this out of its modules' names, checkpoints have it.
_OLD_PART = "vision_model."


def build(make: Callable[[], ModuleT], checkpoint: Checkpoint, prefixes: Sequence[str]) -> ModuleT:
    """Return ``make()`` with the checkpoint's weights instead of random ones, ready to compute.

    In the checkpoint their names begin with one of ``prefixes``. Raises ConfigError for what is missing.
    """
    with _NoRandomWeights():
        module = make()
    state = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            bare = name.removeprefix(_OLD_PART)
            found = checkpoint.first_of(
                *(f"{prefix}{part}{bare}" for prefix in prefixes for part in ("", _OLD_PART))
            )
            state[name] = checkpoint.take(found, *tensor.shape)
    module.load_state_dict(state, strict=False, assign=True)
    return module.eval().requires_grad_(False)


class _NoRandomWeights(TorchFunctionMode):
    """While it is entered, weights are not filled: most would be thrown away, after seconds of work."""

    _FILLS = (
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.zero_,
        torch.Tensor.fill_,
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in self._FILLS and isinstance(args[0], torch.nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))
