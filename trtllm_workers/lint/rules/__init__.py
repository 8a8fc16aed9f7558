"""All rules over engine configs: each config alone, prefill with decode, encode with both, then the deployment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules import (
    memory,
    numbers,
    pair,
    roles,
    routing,
    speculative,
    topology,
    variables,
)
from trtllm_workers.lint.rules.model import Model, read_model
from trtllm_workers.lint.rules.rule import (
    DeploymentRule,
    DocumentRule,
    Facts,
    PairRule,
    rule_name,
)
from trtllm_workers.types import Role


def model_config(documents: Sequence[Document], facts: Facts) -> Iterator[Problem]:
    """The model's config.json must be readable for what is computed from it."""
    path = facts.context.model_path
    if path is None or facts.model is not None:
        return
    try:
        read_model(path)
    except ConfigError as error:
        yield Problem(
            Severity.WARNING,
            "model-config",
            f"memory, heads and layers were not checked: {error}",
            advice="give the folder of the checkpoint that the workers load",
        )


DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    *roles.DOCUMENT_RULES,
    *numbers.DOCUMENT_RULES,
    *speculative.DOCUMENT_RULES,
    *topology.DOCUMENT_RULES,
    *routing.DOCUMENT_RULES,
    *memory.DOCUMENT_RULES,
)
PAIR_RULES: tuple[PairRule, ...] = (
    *pair.PAIR_RULES,
    *speculative.PAIR_RULES,
    *topology.PAIR_RULES,
)
DEPLOYMENT_RULES: tuple[DeploymentRule, ...] = (model_config, variables.check_variables)

RULE_NAMES: tuple[str, ...] = (
    *(rule_name(rule) for rule in DOCUMENT_RULES),
    *(rule_name(rule) for rule in PAIR_RULES),
    *(rule_name(rule) for rule in pair.ENCODE_RULES),
    *(rule_name(rule) for rule in variables.VARIABLE_RULES),
    rule_name(model_config),
)


def check(documents: Sequence[Document], context: LintContext) -> list[Problem]:
    """Return what all rules find, in the order of the rules.

    Every prefill document is compared with every decode document, and every encode document with all
    others: give only those of one deployment.
    """
    facts = Facts(context, _model(context))
    found = [
        problem for doc in documents for rule in DOCUMENT_RULES for problem in rule(doc, facts)
    ]
    decodes = [doc for doc in documents if doc.role is Role.DECODE]
    for prefill in (doc for doc in documents if doc.role is Role.PREFILL):
        for decode in decodes:
            found += [problem for rule in PAIR_RULES for problem in rule(prefill, decode, facts)]
    for encode in (doc for doc in documents if doc.role is Role.ENCODE):
        for other in (doc for doc in documents if doc.role is not Role.ENCODE):
            found += [
                problem for rule in pair.ENCODE_RULES for problem in rule(encode, other, facts)
            ]
    found += [problem for rule in DEPLOYMENT_RULES for problem in rule(documents, facts)]
    return found


def _model(context: LintContext) -> Model | None:
    if context.model_path is None:
        return None
    try:
        return read_model(context.model_path)
    except ConfigError:
        return None  # model_config says why
