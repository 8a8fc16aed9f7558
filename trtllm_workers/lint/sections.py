"""Checks that concern several keys of one section: what is missing, what excludes what. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trtllm_workers.config.schema import KeySpec
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.graphs import generated_sizes

_SPECULATIVE = "speculative_config"
# Without its selector nobody knows what such a section needs.
_SELECTED = (_SPECULATIVE, "sparse_attention_config")


def check_section(
    document: Document, section: str, keys: Mapping[str, KeySpec], choice: str | None
) -> list[Problem]:
    """Return what is wrong with a section as a whole; nothing for one that is not given."""
    found: list[Problem] = []
    prefix = f"{section}." if section else ""
    if section and not document.has_section(section):
        return found
    if section and (choice is not None or section not in _SELECTED):
        for key, spec in keys.items():
            if spec.required and not document.given(prefix + key):
                said = f" with {choice}" if choice else ""
                found.append(
                    document.problem(
                        Severity.ERROR,
                        "missing-key",
                        section,
                        f"'{section}'{said} needs '{key}'",
                    )
                )
    if check := _CHECKS.get(section):
        found += check(document)
    return found


def check_top(document: Document) -> list[Problem]:
    """Return what is wrong with keys of the top level that need each other."""
    return _ray(document)


def _cuda_graphs(document: Document) -> list[Problem]:
    sizes = document.values.get("cuda_graph_config.batch_sizes")
    largest = document.values.get("cuda_graph_config.max_batch_size")
    if not sizes or not largest:
        return []
    padding = bool(document.get("cuda_graph_config.enable_padding"))
    if tuple(sorted(sizes)) == generated_sizes(largest, padding=padding):
        return []  # TensorRT-LLM takes both when they say the same
    return [
        document.problem(
            Severity.ERROR,
            "exclusive-keys",
            "cuda_graph_config.max_batch_size",
            f"batch_sizes and max_batch_size ({largest}) exclude each other",
            advice="keep one: sizes of your own, or a largest one and the sizes TensorRT-LLM makes of it",
        )
    ]


def _draft_lengths(document: Document) -> list[Problem]:
    key = f"{_SPECULATIVE}.draft_len_schedule"
    schedule: dict[int, Any] = document.values.get(key) or {}
    longest = document.values.get(f"{_SPECULATIVE}.max_draft_len")
    if not schedule:
        return []
    wrong = ""
    if any(size < 1 for size in schedule):
        wrong = "its keys are batch sizes, 1 or more"
    elif any(not isinstance(length, int) or length < 0 for length in schedule.values()):
        wrong = "its values are draft lengths, 0 or more"
    elif 1 not in schedule:
        wrong = "it needs the batch size 1"
    elif longest is not None and schedule[1] != longest:
        wrong = f"the length for batch size 1 ({schedule[1]}) must be max_draft_len ({longest})"
    elif longest is not None and max(schedule.values()) > longest:
        wrong = f"no length may be above max_draft_len ({longest})"
    if not wrong:
        return []
    return [document.problem(Severity.ERROR, "wrong-value", key, f"'{key}': {wrong}")]


def _speculative(document: Document) -> list[Problem]:
    return [*_draft_lengths(document), *_dynamic_tree(document)]


def _dynamic_tree(document: Document) -> list[Problem]:
    dynamic = document.values.get(f"{_SPECULATIVE}.use_dynamic_tree")
    top = f"{_SPECULATIVE}.dynamic_tree_max_topK"
    if dynamic and not (document.values.get(top) or 0) > 0:
        text = f"'{_SPECULATIVE}.use_dynamic_tree' needs dynamic_tree_max_topK above 0"
        key = f"{_SPECULATIVE}.use_dynamic_tree"
        return [document.problem(Severity.ERROR, "missing-key", key, text)]
    choices = f"{_SPECULATIVE}.eagle_choices"
    if dynamic and document.values.get(choices):
        text = f"'{choices}' is a fixed tree, and use_dynamic_tree asks for another one"
        return [
            document.problem(
                Severity.ERROR, "exclusive-keys", choices, text, advice="keep one of them"
            )
        ]
    return []


def _load_balancer(document: Document) -> list[Problem]:
    value = document.values.get("moe_config.load_balancer")
    if not isinstance(value, str):
        return []
    places = [Path(value)]
    if document.path is not None and not Path(value).is_absolute():
        places.append(document.path.parent / value)
    if places[0].is_file():
        return []
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    return [
        document.problem(
            Severity.WARNING,
            "missing-file",
            "moe_config.load_balancer",
            f"there is no file {value} here (looked at {looked})",
            advice="TensorRT-LLM opens the path as it stands, on every node, from the worker's directory",
        )
    ]


def _ray(document: Document) -> list[Problem]:
    if document.get("orchestrator_type") == "ray":
        return []
    return [
        document.problem(
            Severity.ERROR, "exclusive-keys", key, f"'{key}' needs orchestrator_type: ray"
        )
        for key in ("ray_worker_extension_cls", "ray_placement_config")
        if document.values.get(key) is not None or document.has_section(key)
    ]


def _dp_waits(document: Document) -> list[Problem]:
    if not document.get("attention_dp_config.enable_balance"):
        return []
    return [
        document.problem(
            Severity.ERROR, "wrong-value", key, f"'{key}' must be 0 or more, not {value}"
        )
        for key in ("attention_dp_config.timeout_iters", "attention_dp_config.batching_wait_iters")
        if (value := document.get(key)) is not None and value < 0
    ]


_CHECKS: dict[str, Callable[[Document], list[Problem]]] = {
    "cuda_graph_config": _cuda_graphs,
    "moe_config": _load_balancer,
    "attention_dp_config": _dp_waits,
    _SPECULATIVE: _speculative,
}
