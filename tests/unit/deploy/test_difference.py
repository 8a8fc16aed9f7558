"""Two runs compared: what changed and nothing else."""

from __future__ import annotations

from tests.unit.deploy.papers import facts, pair, resolved, story, with_env
from trtllm_workers.deploy.difference import ABSENT, as_text, compare
from trtllm_workers.deploy.resolved import EngineSection, Sourced
from trtllm_workers.deploy.story import Story
from trtllm_workers.observe.facts import Library


def changed(a: Story, b: Story) -> list[tuple[str, str, str, str]]:
    return [(one.section, one.name, one.before, one.after) for one in compare(a, b).changes]


def test_the_same_run_has_no_change() -> None:
    found = compare(story(), story("bbb222"))
    assert found.changes == []
    assert found.unknown == []
    assert "nothing changed" in as_text(found)


def test_a_setting_shows_both_values_with_their_sources() -> None:
    settings = {
        "kv_transport": Sourced("nixl", "environment KV_TRANSPORT"),
        "num_workers": Sourced(1, "x"),
    }
    found = compare(story(), story("b", resolved=resolved("b", settings=settings)))
    (one,) = found.changes
    assert (one.before, one.before_source) == ("ucx", "default")
    assert (one.after, one.after_source) == ("nixl", "environment KV_TRANSPORT")
    assert "nixl  [environment KV_TRANSPORT]" in as_text(found)


def test_engine_config_keys_and_roles_are_compared() -> None:
    other = EngineSection(engine="torch", settings={"max_batch_size": Sourced(16, "agg.yaml:9")})
    b = story("b", resolved=resolved("b", engine_configs={"aggregated": other, "decode": other}))
    assert changed(story(), b) == [
        ("engine config", "max_batch_size", "8", "16"),
        ("engine config", "role", ABSENT, "torch"),
    ]


def test_variables_are_compared_but_not_what_every_run_has_of_its_own() -> None:
    def with_variables(run_id: str, **variables: str) -> Story:
        return story(run_id, facts=(with_env(facts(), **variables), facts("ingress")))

    a = with_variables("a", TRTLLM_EPLB_SHM_NAME="one", OMPI_COMM_WORLD_RANK="0", NCCL_DEBUG="INFO")
    b = with_variables("b", TRTLLM_EPLB_SHM_NAME="two", OMPI_COMM_WORLD_RANK="1", UCX_TLS="tcp")
    found = compare(a, b)
    assert changed(a, b) == [
        ("environment", "NCCL_DEBUG", "INFO", ABSENT),
        ("environment", "UCX_TLS", "all", "tcp"),
    ]
    assert {one.where for one in found.changes} == {"worker-0"}


def test_a_change_that_all_processes_share_is_told_once() -> None:
    new = tuple(with_env(facts(name), UCX_TLS="rc") for name in ("worker-0", "ingress"))
    (one,) = compare(story(facts=(facts(), facts("ingress"))), story("b", facts=new)).changes
    assert one.where == ""


def test_versions_libraries_hosts_and_transports_are_compared() -> None:
    new = facts(
        host="node9",
        packages={"torch": "2.10.0"},
        libraries=(Library("libucp", "/usr/lib/libucp.so.0", "0"),),
        num_cpus=8,
    )
    a = story(facts=(facts(),), pairs=(pair(),))
    b = story("b", facts=(new, facts("worker-1")), pairs=(pair("tcp", "tcp"),))
    found = changed(a, b)
    assert ("versions", "torch", "2.9.0", "2.10.0") in found
    assert ("versions", "libucp", "/opt/ucx/libucp.so.0.0.0", "/usr/lib/libucp.so.0") in found
    assert ("hosts", "hosts", "node1", "node1, node9") in found
    assert ("hosts", "CPUs", "16", "8") in found
    assert ("hosts", "processes", ABSENT, "worker-1") in found
    assert ("transports", "decode-0 from prefill-0", "ucx over rc", "tcp over tcp") in found


def test_what_cannot_be_compared_is_said() -> None:
    found = compare(story(), story("b", resolved=None, facts=()))
    assert found.changes == []
    assert [one.partition(":")[0] for one in found.unknown] == [
        "settings, engine configs, versions",
        "variables, libraries, hosts",
    ]
    assert "not compared: settings" in as_text(found)


def test_versions_of_the_launcher_count_where_there_are_no_facts() -> None:
    a = story(facts=())
    b = story("b", facts=(), resolved=resolved("b", packages={"torch": "3"}, version="0.2.0"))
    assert changed(a, b) == [
        ("versions", "trtllm-launch", "0.1.0", "0.2.0"),
        ("versions", "torch", "2.9.0", "3"),
    ]
