from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.config.engine_config import Override
from trtllm_workers.config.options import GROUPS, LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings, resolve, show_settings
from trtllm_workers.engines.registry import ENGINES
from trtllm_workers.errors import ConfigError

SECRET = "not-to-be-seen-anywhere"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def settle(model: Path, explicit: Mapping[str, Any] | None = None, **environ: str) -> Settings:
    return resolve(explicit or {}, {"HOME": "/home/me", **environ}, demo=(model, "demo"))


def refused(model: Path, explicit: Mapping[str, Any] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(model, explicit, **environ)
    return str(caught.value)


def test_options_are_consistent() -> None:
    names = [option.name for option in LAUNCH_OPTIONS]
    flags = [option.flag for option in LAUNCH_OPTIONS if option.flag]
    variables = [name for option in LAUNCH_OPTIONS for name in option.env]
    for unique in (names, flags, variables):
        assert len(unique) == len(set(unique))
    for option in LAUNCH_OPTIONS:
        assert option.group in GROUPS
        assert option.flag is None or option.flag.startswith("--")
        assert option.flag or option.env, f"{option.name} cannot be set"
        assert not (option.secret and option.flag), "a secret in a flag shows in ps"
        assert option.default not in (None, ()) or option.default_text or option.multiple
        assert len(option.help) < 90


def test_settings_have_one_field_per_option() -> None:
    fields = set(Settings.__dataclass_fields__) - {"sources", "warnings"}
    assert fields == {option.name for option in LAUNCH_OPTIONS}


def test_engine_choices_are_those_of_the_registry() -> None:
    engine = next(option for option in LAUNCH_OPTIONS if option.name == "engine")
    assert set(engine.choices) == {"auto", *ENGINES}


def test_without_anything_the_demo_model_is_served_by_torch(model: Path) -> None:
    settings = settle(model)
    assert (settings.model_path, settings.served_model_name) == (model, "demo")
    assert settings.engine == "torch"
    assert settings.engine_config is not None
    assert settings.engine_config.name == "agg.yaml"
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 8000)
    assert settings.run_dir == Path("/home/me/.local/state/trtllm-launch")
    assert settings.warnings == ()


@pytest.mark.parametrize("engine", ["torch", "trtllm"])
def test_auto_takes_the_engine_that_it_is_told_and_says_why(model: Path, engine: str) -> None:
    told = (engine, "a reason")
    by_default = resolve({}, {}, demo=(model, "demo"), auto_engine=lambda: told)
    assert by_default.engine == engine
    assert by_default.sources["engine"] == f"default (auto takes {engine}: a reason)"
    asked = resolve({}, {"ENGINE": "auto"}, demo=(model, "demo"), auto_engine=lambda: told)
    assert asked.sources["engine"] == f"environment ENGINE (auto takes {engine}: a reason)"


def test_a_named_engine_is_taken_without_a_look_at_the_host(model: Path) -> None:
    def looked() -> tuple[str, str]:
        raise AssertionError("the host was looked at")

    settings = resolve({"engine": "sim"}, {}, demo=(model, "demo"), auto_engine=looked)
    assert (settings.engine, settings.sources["engine"]) == ("sim", "--engine")


def test_each_value_names_its_source(model: Path) -> None:
    settings = settle(model, {"http_port": "9000"}, NUM_WORKERS="2", HTTP_PORT="1")
    assert (settings.http_port, settings.sources["http_port"]) == (9000, "--http-port")
    assert (settings.num_workers, settings.sources["num_workers"]) == (
        2,
        "environment NUM_WORKERS",
    )
    assert settings.sources["http_host"] == "default"


def test_served_name_comes_from_the_last_folder(model: Path) -> None:
    assert settle(model, MODEL_PATH=str(model)).served_model_name == "tiny-llama"
    assert settle(model, {"model_path": "tiny-llama/"}).served_model_name == "tiny-llama"
    named = settle(model, MODEL_PATH=str(model), SERVED_MODEL_NAME="a model")
    assert named.served_model_name == "a model"


def test_served_name_of_a_hub_snapshot_is_its_hub_id(tmp_path: Path, model: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de2"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert settle(model, {"model_path": snapshot}).served_model_name == "Qwen/Qwen3-0.6B"


def test_an_empty_variable_counts_as_unset(model: Path) -> None:
    assert settle(model, HTTP_PORT="", MODEL_PATH=" ").http_port == 8000


def test_choices_ignore_case(model: Path) -> None:
    settings = settle(model, {"engine": "SIM"}, LOG_LEVEL="Warning")
    assert (settings.engine, settings.log_level) == ("sim", "warning")


def test_overrides_are_taken_apart(model: Path) -> None:
    settings = settle(model, {"overrides": ("a.b=1", "c=x=y")})
    assert settings.overrides == (Override("a.b", "1", "--set"), Override("c", "x=y", "--set"))


def test_every_problem_is_named_at_once(model: Path, golden: Callable[[str, str], None]) -> None:
    said = refused(
        model,
        {
            "http_port": "99999",
            "engine": "trtlm",
            "log_level": "warn",
            "overrides": ("nothing",),
            "served_model_name": " ",
        },
        MODEL_PATH="Qwen/Qwen3-0.6B",
        NUM_WORKERS="two",
        START_TIMEOUT_S="nan",
        DISCOVERY="etcd://localhost:2379",
        AGG_ENGINE_ARGS="missing.yaml",
        SIM_COST_MODEL="tiny-llama",
        HTTP_HOST="http://localhost",
        CLUSTER_SECRET="short",
    )
    golden("config/settings_errors.txt", said)


def test_param_names_the_first_option_at_fault(model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(model, {"http_port": "x"})
    assert caught.value.param == "http_port"


@pytest.mark.parametrize("host", ["http://x", "[::1]", "localhost:80", "a/b"])
def test_a_host_is_a_host_alone(model: Path, host: str) -> None:
    assert "must be a host name or an address alone" in refused(model, HTTP_HOST=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "node-1.cluster"])
def test_hosts_and_addresses_are_taken(model: Path, host: str) -> None:
    assert settle(model, {"http_host": host}).http_host == host


def test_without_demo_a_model_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="give --model-path DIR or set MODEL_PATH"):
        resolve({}, {"HOME": "/home/me"})


def test_a_path_that_is_no_model_says_what_was_looked_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "(it is empty)" in refused(model, MODEL_PATH=str(tmp_path / "empty"))
    assert "(it holds empty, tiny-llama)" in refused(model, MODEL_PATH=str(tmp_path))
    assert "is a file; give the folder" in refused(model, MODEL_PATH="tiny-llama/config.json")
    missing = refused(model, MODEL_PATH="/nowhere/llama")
    assert "there is no folder '/nowhere/llama'" in missing
    assert "looked for '/nowhere/llama/config.json'" in missing
    assert "File name too long" in refused(model, MODEL_PATH="/x" * 3000)


def test_a_hub_id_with_a_copy_on_this_machine_is_pointed_to_it(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    said = refused(model, MODEL_PATH="org/name", HF_HOME=str(tmp_path))
    assert f"A copy is on this machine: --model-path {copy}" in said


def test_the_secret_is_never_shown(model: Path) -> None:
    settings = settle(model, CLUSTER_SECRET=SECRET)
    assert settings.cluster_secret == SECRET
    for text in (show_settings(settings), repr(settings), refused(model, CLUSTER_SECRET="abc!")):
        assert SECRET not in text
        assert "abc!" not in text


def test_two_variables_for_one_option_are_pointed_out(model: Path) -> None:
    settings = settle(model, HTTP_PORT="1", DYN_HTTP_PORT="2")
    assert settings.http_port == 1
    assert settings.warnings == ("environment DYN_HTTP_PORT is ignored: HTTP_PORT is set as well",)
    assert settle(model, DYN_HTTP_PORT="2").http_port == 2


def test_a_cost_model_without_sim_is_pointed_out(model: Path, tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("")
    (warning,) = settle(model, {"sim_cost_model": str(cost)}).warnings
    assert warning == "--sim-cost-model has no effect: the engine is torch, not sim"
    assert settle(model, {"sim_cost_model": str(cost), "engine": "sim"}).warnings == ()


def test_show_settings_lists_every_option(model: Path, golden: Callable[[str, str], None]) -> None:
    settings = settle(
        model,
        {
            "model_path": "tiny-llama",
            "engine_config": "tiny-llama/config.json",
            "prefill_engine_config": "prefill.yaml",
            "decode_engine_config": "decode.yaml",
            "encode_engine_config": "encode.yaml",
        },
        CLUSTER_SECRET=SECRET,
        LOG_FORMAT="json",
    )
    golden("config/show_settings.txt", show_settings(settings))


def test_a_name_that_is_no_option_is_a_mistake_of_ours(model: Path) -> None:
    with pytest.raises(TypeError, match="http_prot"):
        settle(model, {"http_prot": 1})


PORTS = st.none() | st.integers(0, 65535)


@given(flag=PORTS, first=PORTS, second=PORTS)
def test_flag_beats_first_variable_beats_second_beats_default(
    tmp_path_factory: pytest.TempPathFactory,
    flag: int | None,
    first: int | None,
    second: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    pairs = (("HTTP_PORT", first), ("DYN_HTTP_PORT", second))
    environ = {name: str(port) for name, port in pairs if port is not None}
    settings = settle(folder, {"http_port": flag}, **environ)
    expected = next((port for port in (flag, first, second) if port is not None), 8000)
    assert settings.http_port == expected
