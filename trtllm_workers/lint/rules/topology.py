"""How a worker's GPUs divide the model: sizes against GPUs, heads, layers and experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.experts import load_balancer
from trtllm_workers.lint.rules.rule import DocumentRule, Facts, PairRule, number, parallel

_TP = "tensor_parallel_size"
_PP = "pipeline_parallel_size"
_CP = "context_parallel_size"
_EP = "moe_expert_parallel_size"

# Attention heads of models whose folder may not be at hand where the linter runs; by a part of the name.
KNOWN_HEADS: Mapping[str, int] = {"llama-4-maverick": 40, "llama-4-scout": 40}


def world_size(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A worker's parallel sizes multiply to the GPUs it gets."""
    gpus, sizes = facts.context.num_gpus.get(doc.role), parallel(doc)
    if gpus is None or gpus == sizes.world:
        return
    yield doc.problem(
        Severity.ERROR,
        "world-size",
        _size_key(doc),
        f"the config wants {_gpus(sizes.world)}, a worker of role {doc.role} gets {gpus}",
        advice="change the parallel sizes, or the number of GPUs for this role",
        arithmetic=(f"TP {sizes.tp} × PP {sizes.pp} × CP {sizes.cp} = {sizes.world} ≠ {gpus}",),
    )


def node_size(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A worker fills whole nodes, or fits into one."""
    given, sizes = doc.get("gpus_per_node"), parallel(doc)
    per_node = facts.context.gpus_per_node
    if per_node is not None and isinstance(given, int) and given != per_node:
        yield doc.problem(
            Severity.ERROR,
            "node-size",
            "gpus_per_node",
            f"the file says {given} GPUs per node, the deployment has {per_node}",
            advice=f"remove the key, or write gpus_per_node: {per_node}",
        )
        return
    per_node = per_node or given
    if not isinstance(per_node, int) or per_node < 1:
        return
    if sizes.world > per_node and sizes.world % per_node:
        yield doc.problem(
            Severity.ERROR,
            "node-size",
            _size_key(doc),
            f"{sizes.world} GPUs do not fill whole nodes of {per_node}",
            advice=f"choose parallel sizes whose product is a multiple of {per_node}",
            arithmetic=(
                f"TP {sizes.tp} × PP {sizes.pp} × CP {sizes.cp} = {sizes.world}; "
                f"{sizes.world} mod {per_node} = {sizes.world % per_node}",
            ),
        )
    elif sizes.world <= per_node and per_node % sizes.world:
        yield doc.problem(
            Severity.NOTE,
            "node-size",
            _size_key(doc),
            f"workers of {_gpus(sizes.world)} leave {per_node % sizes.world} of a node's {per_node} unused",
            arithmetic=(f"{per_node} mod {sizes.world} = {per_node % sizes.world}",),
        )


def expert_parallel(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Expert and tensor parallelism of the experts multiply to the tensor parallel size."""
    tp = number(doc, _TP, 1)
    ep, moe_tp = number(doc, _EP, -1), number(doc, "moe_tensor_parallel_size", -1)
    cluster = max(1, number(doc, "moe_cluster_parallel_size", -1))
    known = [size for size in (ep, moe_tp) if size >= 1]
    product = cluster
    for size in known:
        product *= size
    if not known or product == tp or (len(known) == 1 and product <= tp and tp % product == 0):
        return
    names = [f"EP {ep}"] * (ep >= 1) + [f"MoE TP {moe_tp}"] * (moe_tp >= 1)
    names += [f"MoE cluster {cluster}"] * (cluster > 1)
    relation = "≠" if len(known) == 2 else ">" if product > tp else "does not divide"
    yield doc.problem(
        Severity.ERROR,
        "expert-parallel",
        _EP if ep >= 1 else "moe_tensor_parallel_size",
        f"the experts' parallel sizes do not multiply to {_TP} {tp}",
        advice=f"write {_EP}: {tp} alone, or sizes whose product is {tp}",
        arithmetic=(f"{' × '.join(names)} = {product} {relation} TP {tp}",),
    )


def attention_heads(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Tensor parallelism divides the attention heads, unless attention is data parallel."""
    sizes, model = parallel(doc), facts.model
    name = facts.context.model_name.lower()
    heads = (
        model.heads
        if model is not None
        else next((count for part, count in KNOWN_HEADS.items() if part in name), 0)
    )
    if sizes.attention_dp or heads < 1 or heads % sizes.tp == 0:
        return
    fitting = [size for size in (1, 2, 4, 8, 16, 32) if heads % size == 0 and size < sizes.tp]
    yield doc.problem(
        Severity.ERROR,
        "attention-heads",
        _TP,
        f"{heads} attention heads cannot be divided by TP {sizes.tp}",
        advice=f"write {_TP}: {fitting[-1] if fitting else 1}, or enable_attention_dp: true",
        arithmetic=(f"{heads} mod {sizes.tp} = {heads % sizes.tp}",),
    )


def kv_heads(doc: Document, facts: Facts) -> Iterator[Problem]:
    """KV heads are divided by tensor parallelism, or copied evenly when there are fewer."""
    sizes, model = parallel(doc), facts.model
    if model is None or model.mla or sizes.attention_dp or model.kv_heads < 1:
        return
    heads, tp = model.kv_heads, sizes.tp
    if heads % tp == 0:
        return
    if tp % heads:
        yield doc.problem(
            Severity.ERROR,
            "kv-heads",
            _TP,
            f"{heads} KV heads can be neither divided by TP {tp} nor copied evenly",
            advice=f"write a {_TP} that divides {heads} or is a multiple of it",
            arithmetic=(f"{heads} mod {tp} = {heads % tp}, {tp} mod {heads} = {tp % heads}",),
        )
    else:
        yield doc.problem(
            Severity.NOTE,
            "kv-heads",
            _TP,
            f"each of {heads} KV heads is kept on {tp // heads} GPUs: the KV cache holds no more tokens "
            f"than with TP {heads}",
            arithmetic=(f"TP {tp} / {heads} KV heads = {tp // heads} copies",),
        )


def pipeline_layers(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Each pipeline stage gets layers, and pp_partition shares out all of them."""
    stages, partition = number(doc, _PP, 1), doc.get("pp_partition")
    layers = facts.model.layers if facts.model is not None else None
    if layers is not None and layers < stages:
        yield doc.problem(
            Severity.ERROR,
            "pipeline-layers",
            _PP,
            f"{layers} layers are too few for {stages} pipeline stages",
            advice=f"write {_PP}: {layers} or less",
        )
    if not isinstance(partition, list) or not partition:
        return
    if len(partition) != stages:
        yield doc.problem(
            Severity.ERROR,
            "pipeline-layers",
            "pp_partition",
            f"pp_partition names {len(partition)} stages, {_PP} {stages}",
            advice=f"write {stages} numbers",
        )
    elif layers is not None and sum(partition) != layers:
        yield doc.problem(
            Severity.ERROR,
            "pipeline-layers",
            "pp_partition",
            f"pp_partition shares out {sum(partition)} layers, the model has {layers}",
            advice=f"write numbers that add up to {layers}",
            arithmetic=(f"{' + '.join(map(str, partition))} = {sum(partition)} ≠ {layers}",),
        )


def expert_split(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Experts, or the load balancer's slots for them, divide evenly over the GPUs."""
    ep, experts = parallel(doc).ep, facts.model.experts if facts.model is not None else 0
    balancer = load_balancer(doc)
    slots = balancer.get("num_slots") if balancer else None
    if isinstance(slots, int):
        key = "moe_config.load_balancer"
        if slots < experts:
            yield doc.problem(
                Severity.ERROR,
                "expert-split",
                key,
                f"num_slots {slots} is less than the model's {experts} experts",
                advice=f"write num_slots: {-(-experts // ep) * ep} or more",
                arithmetic=(f"{slots} slots < {experts} experts",),
            )
        elif slots % ep:
            yield doc.problem(
                Severity.ERROR,
                "expert-split",
                key,
                f"num_slots {slots} cannot be divided by EP {ep}",
                advice=f"write num_slots: {-(-slots // ep) * ep}",
                arithmetic=(f"{slots} mod {ep} = {slots % ep}",),
            )
    elif experts % ep:
        yield doc.problem(
            Severity.ERROR,
            "expert-split",
            _EP,
            f"{experts} experts cannot be divided by EP {ep}",
            advice="choose a size that divides them, or a load balancer with num_slots",
            arithmetic=(f"{experts} mod {ep} = {experts % ep}",),
        )


def wide_ep(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The MoE backend WIDEEP wants attention data parallelism and more than one GPU for experts."""
    if doc.get("moe_config.backend") != "WIDEEP":
        return
    sizes, missing = parallel(doc), []
    if not sizes.attention_dp:
        missing.append("enable_attention_dp: true")
    if sizes.ep < 2:
        missing.append(f"{_EP}: {sizes.tp if sizes.tp > 1 else 'more than 1'}")
    if missing:
        yield doc.problem(
            Severity.ERROR,
            "wide-ep",
            "moe_config.backend",
            "WIDEEP needs attention data parallelism and experts on more than one GPU",
            advice=f"write {' and '.join(missing)}, or another backend",
        )


def balancer_backend(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A load balancer of experts belongs to the backend WIDEEP."""
    backend = doc.get("moe_config.backend")
    if doc.get("moe_config.load_balancer") is not None and backend != "WIDEEP":
        yield doc.problem(
            Severity.WARNING,
            "balancer-backend",
            "moe_config.load_balancer",
            f"a load balancer of experts beside the MoE backend {backend}: it is made for WIDEEP",
            advice="write moe_config.backend: WIDEEP, or remove the load balancer",
        )


def helix_block_size(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Context parallelism of type HELIX has a block size of its own that must be the KV cache's."""
    config: Any = doc.get("cp_config")
    if not isinstance(config, Mapping) or number(doc, "context_parallel_size", 1) == 1:
        return
    if str(config.get("cp_type", "")).rpartition(".")[2].upper() != "HELIX":
        return
    own, size = config.get("tokens_per_block"), doc.get("kv_cache_config.tokens_per_block")
    if own is not None and own != size:
        yield doc.problem(
            Severity.ERROR,
            "helix-block-size",
            "cp_config.tokens_per_block",
            f"HELIX counts blocks of {own} tokens, the KV cache of {size}",
            advice=f"write cp_config.tokens_per_block: {size}",
        )


def pipeline_to_tensor(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Prefill in pipeline stages with tensor parallel decode hangs in 1.2."""
    stages, tp = parallel(prefill).pp, parallel(decode).tp
    if stages > 1 and tp > 1:
        yield prefill.problem(
            Severity.ERROR,
            "pipeline-to-tensor",
            _PP,
            f"TensorRT-LLM 1.2 can hang when prefill has pipeline stages ({stages}) and decode "
            f"({decode.name}) is tensor parallel ({tp})",
            advice=f"write {_PP}: 1 here and raise {_TP} instead",
        )


def tensor_parallel_differs(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Prefill and decode with different tensor parallel sizes gave wrong text for some models."""
    mine, theirs = parallel(prefill).tp, parallel(decode).tp
    if mine != theirs:
        yield decode.problem(
            Severity.WARNING,
            "tensor-parallel-differs",
            _TP,
            f"TP is {theirs} here and {mine} in {prefill.name}; for some models that is reported to give "
            "wrong text",
            advice="use the same size, or watch the canary, which compares answers with an undivided run",
        )


def attention_dp_differs(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Models with latent attention want attention data parallelism on both sides or on none."""
    mine, theirs = parallel(prefill).attention_dp, parallel(decode).attention_dp
    if facts.model is not None and facts.model.mla and mine != theirs:
        yield decode.problem(
            Severity.WARNING,
            "attention-dp-differs",
            "enable_attention_dp",
            f"attention data parallelism is {_on(theirs)} here and {_on(mine)} in {prefill.name}; with "
            "latent attention (MLA) KV then lies differently on the two sides",
            advice="set it alike, or watch the canary, which compares answers with an undivided run",
        )


def _size_key(doc: Document) -> str:
    """Return the parallel size to point at: the first that is written down."""
    return next((key for key in (_TP, _PP, _CP) if doc.given(key)), _TP)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _on(value: bool) -> str:
    return "on" if value else "off"


DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    world_size,
    node_size,
    expert_parallel,
    attention_heads,
    kv_heads,
    pipeline_layers,
    expert_split,
    wide_ep,
    balancer_backend,
    helix_block_size,
)
PAIR_RULES: tuple[PairRule, ...] = (
    pipeline_to_tensor,
    tensor_parallel_differs,
    attention_dp_differs,
)
