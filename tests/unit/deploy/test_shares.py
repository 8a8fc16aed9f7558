"""Who gets which GPU: told or not told, enough or too few, one rank or several."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trtllm_workers.deploy.shares import CUDA, Crew, Share, share_out
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

PREFILL_VARIABLE = "environment PREFILL_CUDA_VISIBLE_DEVICES"
DECODE_VARIABLE = "environment DECODE_CUDA_VISIBLE_DEVICES"


def prefill(num_workers: int = 1, *, ranks: int = 1, told: str = "") -> Crew:
    devices = tuple(told.split(",")) if told else None
    return Crew(Role.PREFILL, num_workers, ranks, devices, PREFILL_VARIABLE, gpu_fraction=0.9)


def decode(num_workers: int = 1, *, ranks: int = 1, told: str = "") -> Crew:
    devices = tuple(told.split(",")) if told else None
    return Crew(Role.DECODE, num_workers, ranks, devices, DECODE_VARIABLE, gpu_fraction=0.9)


def dealt(
    *crews: Crew, gpus: Sequence[str] = ()
) -> tuple[list[list[str | None]], tuple[str, ...], dict[Role, list[Share]]]:
    """Return each crew's CUDA_VISIBLE_DEVICES, the notes, and the shares."""
    shares, notes = share_out(crews, gpus, 8, threads_are_set=False)
    return [[one.env.get(CUDA) for one in shares[crew.role]] for crew in crews], notes, shares


def refused(*crews: Crew, gpus: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        share_out(crews, gpus, 8, threads_are_set=False)
    return str(caught.value)


def test_roles_get_gpus_in_order_one_per_rank() -> None:
    devices, notes, _ = dealt(prefill(2), decode(1, ranks=2), gpus="01234")
    assert devices == [["0", "1"], ["2,3"]]
    assert notes == ()


def test_roles_get_what_they_are_told_even_where_no_gpu_is_seen() -> None:
    devices, notes, _ = dealt(prefill(told="3"), decode(2, told="GPU-a,GPU-b"))
    assert devices == [["3"], ["GPU-a", "GPU-b"]]
    assert notes == ()


def test_role_that_is_told_nothing_gets_what_the_other_was_not_told() -> None:
    devices, _, _ = dealt(prefill(), decode(told="0"), gpus="01")
    assert devices == [["1"], ["0"]]
    devices, _, _ = dealt(prefill(told="1"), decode(2), gpus="012")
    assert devices == [["1"], ["0", "2"]]


def test_role_that_is_told_its_gpu_does_not_meet_one_that_is_not() -> None:
    assert refused(prefill(told="0"), decode(), gpus="0") == (
        f"{PREFILL_VARIABLE} gives GPU 0 to prefill, and this host has no other GPU for decode; name "
        "GPUs for decode too, with DECODE_CUDA_VISIBLE_DEVICES (the same ones if they are to be shared)"
    )


def test_roles_that_are_told_the_same_gpu_share_it_with_a_note() -> None:
    devices, notes, shares = dealt(prefill(told="0"), decode(told="0"), gpus="01")
    assert devices == [["0"], ["0"]]
    assert notes[0] == "prefill and decode share GPU 0"
    assert notes[1].startswith("a worker on a shared GPU takes 0.45 of the memory it finds free")
    assert [share.gpu_fraction for one in shares.values() for share in one] == [0.45, 0.45]


def test_roles_share_the_only_gpu_when_nobody_says_otherwise() -> None:
    devices, notes, _ = dealt(prefill(), decode(), gpus="0")
    assert devices == [["0"], ["0"]]
    assert notes[0] == "prefill and decode share GPU 0"


def test_workers_share_gpus_when_there_are_too_few() -> None:
    devices, notes, shares = dealt(prefill(), decode(3), gpus="012")
    assert devices == [["0"], ["1", "2", "1"]]
    assert notes[0] == "3 decode workers share 2 GPUs"
    assert [share.gpu_fraction for share in shares[Role.DECODE]] == [0.45, None, 0.45]
    assert shares[Role.PREFILL][0].gpu_fraction is None


def test_gpus_beyond_one_per_rank_stay_unused_and_that_is_said() -> None:
    devices, notes, _ = dealt(prefill(told="0,1,2"), decode(told="3"))
    assert devices == [["0"], ["3"]]
    assert notes == (f"{PREFILL_VARIABLE}: GPUs 1,2 stay unused; a worker takes one GPU per rank",)


def test_ranks_of_one_worker_never_share_a_gpu() -> None:
    assert refused(prefill(ranks=2, told="0"), decode(told="1")) == (
        "tensor_parallel_size 2 needs 2 GPUs for each prefill worker, "
        f"but {PREFILL_VARIABLE} names only GPU 0"
    )
    assert refused(prefill(), decode(ranks=2), gpus="01") == (
        "tensor_parallel_size 2 needs 2 GPUs for each decode worker, "
        "but this host has left only GPU 1"
    )
    alone = Crew(Role.AGGREGATED, 1, 2)
    assert refused(alone, gpus="0") == (
        "tensor_parallel_size 2 needs 2 GPUs for each worker, but this host has only GPU 0"
    )


def test_threads_of_a_cpu_are_shared_by_all_ranks_of_all_workers() -> None:
    crews = (prefill(), decode(1, ranks=3))
    shares, _ = share_out(crews, (), 8, threads_are_set=False)
    assert [share.env for one in shares.values() for share in one] == [{"OMP_NUM_THREADS": "2"}] * 2
    shares, _ = share_out(crews, (), 2, threads_are_set=False)
    assert shares[Role.DECODE][0].env == {"OMP_NUM_THREADS": "1"}
    shares, _ = share_out(crews, (), 8, threads_are_set=True)
    assert shares[Role.DECODE][0].env == {}
