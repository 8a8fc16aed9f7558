"""Which worker gets which nodes, and what is said when numbers do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.deploy.support import make_settings
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.config.slurm_options import SlurmSettings
from trtllm_workers.deploy.slurm.layout import CrewShape, Layout, give_nodes, lay_out
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role


def sizes(engine: str = "trtllm", **parallel: int) -> EngineConfig:
    keys = {f"{name}_parallel_size": Setting(value, "a.yaml:1") for name, value in parallel.items()}
    return EngineConfig(engine, keys)


def test_wide_expert_parallelism_on_four_nodes_of_four() -> None:
    settings = make_settings(engine="trtllm", gpus_per_node=4)
    layout = lay_out(settings, SlurmSettings(num_nodes=4), {Role.AGGREGATED: sizes(tensor=16)})
    (crew,) = layout.crews
    assert (crew.num_nodes, crew.ranks_per_node, crew.num_ranks) == (4, 4, 16)
    assert layout.num_nodes == 4


def test_nodes_follow_from_ranks_when_nobody_says_them() -> None:
    settings = make_settings(engine="trtllm", gpus_per_node=8)
    layout = lay_out(settings, SlurmSettings(), {Role.AGGREGATED: sizes(tensor=8, pipeline=2)})
    assert layout.crews[0].num_nodes == 2


def test_roles_are_counted_each_for_itself() -> None:
    settings = make_settings(
        engine="trtllm",
        gpus_per_node=4,
        disaggregated=True,
        num_prefill_workers=2,
        num_decode_workers=1,
    )
    layout = lay_out(
        settings,
        SlurmSettings(num_prefill_nodes=1, num_decode_nodes=4),
        {Role.PREFILL: sizes(tensor=4), Role.DECODE: sizes(tensor=16)},
    )
    assert layout.in_words() == "2 prefill × 1 node + 1 decode × 4 nodes = 6 nodes"
    given_out = give_nodes(layout, [f"n{i}" for i in range(1, 7)])
    assert given_out == {
        "prefill-0": ("n1",),
        "prefill-1": ("n2",),
        "decode-0": ("n3", "n4", "n5", "n6"),
    }


@pytest.mark.parametrize(
    ("asked", "tensor", "words"),
    [
        (
            2,
            16,
            "decode workers: tensor_parallel_size 16 needs 16 GPUs, and 2 nodes × 4 GPUs = 8; "
            "set NUM_DECODE_NODES=4, or give ",
        ),
        (8, 16, "and 8 nodes × 4 GPUs = 32; set NUM_DECODE_NODES=4, or give "),
        (None, 6, "tensor_parallel_size 6 needs 6 GPUs, and 2 nodes × 4 GPUs = 8; give "),
    ],
)
def test_gpus_that_are_not_ranks_are_refused_with_the_arithmetic(
    asked: int | None, tensor: int, words: str
) -> None:
    settings = make_settings(engine="trtllm", gpus_per_node=4, disaggregated=True)
    with pytest.raises(ConfigError, match="decode workers") as caught:
        lay_out(
            settings,
            SlurmSettings(num_prefill_nodes=1, num_decode_nodes=asked),
            {Role.PREFILL: sizes(tensor=4), Role.DECODE: sizes(tensor=tensor)},
        )
    assert words in str(caught.value)


def test_every_role_that_is_wrong_is_named_at_once() -> None:
    settings = make_settings(engine="trtllm", gpus_per_node=4, disaggregated=True)
    with pytest.raises(ConfigError) as caught:
        lay_out(
            settings,
            SlurmSettings(num_prefill_nodes=3, num_decode_nodes=3),
            {Role.PREFILL: sizes(tensor=8), Role.DECODE: sizes(tensor=16)},
        )
    text = str(caught.value)
    assert "prefill workers" in text
    assert "decode workers" in text


def test_a_small_worker_has_its_node_alone_and_that_is_said() -> None:
    settings = make_settings(engine="trtllm", gpus_per_node=8)
    layout = lay_out(settings, SlurmSettings(), {Role.AGGREGATED: sizes(tensor=2)})
    assert layout.crews[0].num_nodes == 1
    assert "leaves 6 of its node's 8 GPUs unused" in layout.notes[0]


def test_four_gpus_are_taken_for_granted_and_that_is_said() -> None:
    layout = lay_out(
        make_settings(engine="trtllm"), SlurmSettings(), {Role.AGGREGATED: sizes(tensor=4)}
    )
    assert "4 GPUs per node are taken for granted" in layout.notes[0]


def test_ranks_on_cpus_are_spread_evenly() -> None:
    settings = make_settings(engine="torch")
    layout = lay_out(
        settings, SlurmSettings(num_nodes=2), {Role.AGGREGATED: sizes("torch", tensor=4)}
    )
    assert (layout.crews[0].num_nodes, layout.crews[0].ranks_per_node) == (2, 2)
    with pytest.raises(ConfigError, match="cannot be spread evenly over 3 nodes"):
        lay_out(settings, SlurmSettings(num_nodes=3), {Role.AGGREGATED: sizes("torch", tensor=4)})


def test_too_few_nodes_are_named() -> None:
    layout = Layout((CrewShape(Role.AGGREGATED, 3, 1, 1),))
    with pytest.raises(ConfigError) as caught:
        give_nodes(layout, ["a", "b"])
    assert "3 nodes, and this allocation has 2 (a, b)" in str(caught.value)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=2
    )
)
def test_no_node_is_given_twice(crews: list[tuple[int, int, int]]) -> None:
    roles = [Role.PREFILL, Role.DECODE]
    layout = Layout(
        tuple(
            CrewShape(role, workers, nodes, ranks)
            for role, (workers, nodes, ranks) in zip(roles, crews, strict=False)
        )
    )
    names = [f"n{i}" for i in range(layout.num_nodes)]
    found = [node for nodes in give_nodes(layout, names).values() for node in nodes]
    assert sorted(found) == sorted(names)
