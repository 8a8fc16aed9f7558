"""Speculative decoding: which kinds work, with what, and on both roles alike. Computes no lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.rule import DISAGGREGATED, DocumentRule, Facts, PairRule

_SECTION = "speculative_config"
_TYPE = f"{_SECTION}.decoding_type"
_REFUSED = {
    "Medusa": "the PyTorch backend has no Medusa",
    "Lookahead": "the PyTorch backend has no Lookahead",
    "UserProvided": "it takes Python objects, which a YAML file cannot hold",
    "Eagle3": "1.2 has no such value; drafters of the third generation are Eagle with their own keys",
}
# Kinds that draft with a second model, whose KV lies beside the target's.
_WITH_DRAFTER = frozenset({"Eagle", "Eagle3", "DraftTarget"})
# What the drafted KV depends on: the two roles then have other layers, so handoffs do not fit.
_LAYOUT = ("decoding_type", "num_nextn_predict_layers", "speculative_model", "eagle3_one_model")


def speculation_type(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Speculation needs a decoding_type."""
    if doc.has_section(_SECTION) and not doc.given(_TYPE):
        yield doc.problem(
            Severity.ERROR,
            "speculation-type",
            _TYPE,
            "speculative_config has no decoding_type, without which TensorRT-LLM refuses it",
            advice="write decoding_type: MTP, Eagle, NGram or DraftTarget",
        )


def speculation_refused(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Some kinds of speculation do not work on the PyTorch backend."""
    kind = doc.get(_TYPE)
    if kind in _REFUSED:
        advice = "Eagle" if kind == "Eagle3" else "MTP, Eagle, NGram or DraftTarget"
        yield doc.problem(
            Severity.ERROR,
            "speculation-refused",
            _TYPE,
            f"{kind} is refused: {_REFUSED[kind]}",
            advice=f"write decoding_type: {advice}",
        )


def speculation_model(doc: Document, facts: Facts) -> Iterator[Problem]:
    """MTP drafts with layers of the model itself, Eagle with a model of its own."""
    if doc.get(_TYPE) != "MTP":
        return
    drafter = next(
        (f"{_SECTION}.{leaf}" for leaf in _DRAFTER_KEYS if doc.get(f"{_SECTION}.{leaf}")), None
    )
    if drafter is not None:
        yield doc.problem(
            Severity.WARNING,
            "speculation-model",
            drafter,
            "MTP drafts with layers of the served model, but a draft model is named",
            advice="write decoding_type: Eagle for that drafter, or remove the key",
        )
    elif facts.model is not None and facts.model.draft_layers == 0:
        kind = facts.model.kind or "this model"
        yield doc.problem(
            Severity.WARNING,
            "speculation-model",
            _TYPE,
            f"MTP needs layers trained for it, and config.json of {kind} names none "
            "(num_nextn_predict_layers)",
            advice="use Eagle with a drafter for this model, or NGram, which needs none",
        )


def speculation_block_reuse(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Blocks are reused for target and drafter together, so their KV must have one dtype."""
    dtype = doc.get("kv_cache_config.dtype")
    if (
        doc.get(_TYPE) not in _WITH_DRAFTER
        or doc.get("kv_cache_config.enable_block_reuse") is False
    ):
        return
    if not isinstance(dtype, str) or dtype == "auto":
        return
    yield doc.problem(
        Severity.WARNING,
        "speculation-block-reuse",
        "kv_cache_config.enable_block_reuse",
        f"block reuse is on with KV in {dtype} and a draft model: it works only when the drafter's KV "
        "has the same dtype",
        advice="write kv_cache_config.enable_block_reuse: false unless both dtypes are known to be equal",
    )


def speculation_overlap(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A drafter that runs as a second model and the overlap scheduler get into each other's way."""
    kind = doc.get(_TYPE)
    two_models = kind == "DraftTarget" or (
        kind == "Eagle" and doc.get(f"{_SECTION}.eagle3_one_model") is False
    )
    if two_models and doc.get("disable_overlap_scheduler") is not True:
        yield doc.problem(
            Severity.WARNING,
            "speculation-overlap",
            "disable_overlap_scheduler",
            f"{kind} with the drafter as a model of its own runs beside the overlap scheduler, which the "
            "known-good configs of this kind switch off",
            advice="write disable_overlap_scheduler: true",
        )


def speculation_accuracy(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Eagle in one model lost accuracy in disaggregation."""
    one_model = doc.get(f"{_SECTION}.eagle3_one_model") is not False
    if doc.role in DISAGGREGATED and doc.get(_TYPE) == "Eagle" and one_model:
        yield doc.problem(
            Severity.WARNING,
            "speculation-accuracy",
            f"{_SECTION}.eagle3_one_model",
            "Eagle in one model (the default) is reported to lose accuracy when prefill and decode are apart",
            advice="write eagle3_one_model: false on both roles, and compare answers with an aggregated worker",
        )


def speculation_logprobs(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Requests that ask for logprobs have brought speculating workers down."""
    if doc.has_section(_SECTION):
        yield doc.problem(
            Severity.NOTE,
            "speculation-logprobs",
            _SECTION,
            "a request that asks for logprobs is reported to crash a worker that speculates",
            advice="refuse logprobs for this model at the ingress, or serve such requests without speculation",
        )


def speculation_differs(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Prefill and decode must speculate alike: drafted tokens and the drafter's KV are handed over."""
    mine, theirs = _settings(prefill), _settings(decode)
    for leaf in sorted(mine.keys() | theirs.keys()):
        if mine.get(leaf) == theirs.get(leaf):
            continue
        layout = leaf in _LAYOUT or not (mine and theirs)
        yield decode.problem(
            Severity.ERROR if layout else Severity.WARNING,
            "speculation-differs",
            f"{_SECTION}.{leaf}" if theirs else _SECTION,
            f"{_SECTION}.{leaf} is {_told(theirs, leaf)} here and {_told(mine, leaf)} in {prefill.name}: "
            + (
                "the KV of one side has other layers than the other's"
                if layout
                else "drafts made on one side do not fit the other"
            ),
            advice=f"write the same speculative_config in {prefill.name} and {decode.name}",
        )
        if not (mine and theirs):
            return  # one side has no speculation: said once


_DRAFTER_KEYS = ("speculative_model", "speculative_model_dir")


def _settings(doc: Document) -> dict[str, Any]:
    prefix = f"{_SECTION}."
    found = {
        "speculative_model" if (leaf := key.removeprefix(prefix)) in _DRAFTER_KEYS else leaf: value
        for key, value in doc.values.items()
        if key.startswith(prefix)
    }
    if not found:
        return {}
    defaults = {
        key.removeprefix(prefix): value
        for key, value in doc.defaults.items()
        if key.startswith(prefix) and value is not None
    }
    return {**defaults, **found}


def _told(settings: dict[str, Any], leaf: str) -> str:
    if not settings:
        return "absent (no speculation)"
    return f"{settings[leaf]!r}" if leaf in settings else "unset"


DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    speculation_type,
    speculation_refused,
    speculation_model,
    speculation_block_reuse,
    speculation_overlap,
    speculation_accuracy,
    speculation_logprobs,
)
PAIR_RULES: tuple[PairRule, ...] = (speculation_differs,)
