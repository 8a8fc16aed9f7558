"""No secret survives: by name, by value in any spelling, by look; and innocent text stays as it is."""

from __future__ import annotations

import base64
import json
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.observe.redact import (
    REDACTED,
    Redactor,
    anonymous,
    is_secret_name,
    secret_values,
)

SECRET_NAMES = (
    "HF_TOKEN",
    "cluster_secret",
    "CLUSTER_SECRET",
    "nats_password",
    "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
    "apiKey",
    "authToken",
    "Authorization",
    "--nats-token",
    "db.passwd",
)
INNOCENT_NAMES = (
    "max_num_tokens",
    "eos_token_id",
    "TOKENIZERS_PARALLELISM",
    "PWD",
    "etcd_key",
    "key",
    "kv_cache_config.max_tokens",
    "MONKEY",
    "UCX_TLS",
)
VALUE = "correct-horse+battery/staple=9"


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_name_is_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", INNOCENT_NAMES)
def test_an_innocent_name_is_left_alone(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN={VALUE}",
        f"export API_KEY='{VALUE} and more'",
        f'{{"nats_password": "{VALUE}", "n": 1}}',
        f"  password: {VALUE}  # of the queue",
        f"--nats-token {VALUE} --model x",
        f"--etcd-password={VALUE}",
        f"Authorization: Bearer {VALUE}",
        f"authorization: '{VALUE}'",
        f"curl -H 'Authorization: Token {VALUE}' http://x",
        f"nats://bob:{VALUE}@host:4222",
        f"https://{quote(VALUE, safe='')}@github.com/x.git",
        f"http://host/path?a=1&token={quote(VALUE, safe='')}&b=2",
        f"postgres://u:{VALUE}@db/x",
        "hf_abcdefghijklmnopqrstuvwx",
        "sk-proj-abcdefghijklmnop1234",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        f"-----BEGIN RSA PRIVATE KEY-----\n{VALUE}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_no_secret_survives_without_its_value_being_known(text: str) -> None:
    cleaned = Redactor().text(text)
    assert REDACTED in cleaned
    for secret in (VALUE, quote(VALUE, safe=""), "hf_abc", "sk-proj", "dozjgNryP4J3"):
        assert secret not in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "first token: 12.5 ms",
        "max_num_tokens: 8192",
        "http://10.0.0.1:8000/v1/models asked by user@host",
        "engine_configs/decode.yaml:7: unknown key 'kv_cache_config.free'",
        "worker-0@127.0.0.1:42653 is connected",
        "PWD=/home/bob",
        "key: value",
        "token_ids=[1, 2, 3] tokens=17",
    ],
)
def test_innocent_text_stays_as_it_is(text: str) -> None:
    assert Redactor().text(text) == text


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=8, max_size=40)
)
def test_a_known_value_is_found_in_every_spelling(value: str) -> None:
    redactor = Redactor([value])
    packed = base64.b64encode(value.encode()).decode()
    for spelling in (value, json.dumps(value), quote(value, safe=""), packed):
        assert spelling.strip('"') not in redactor.text(f"seen {spelling} here").replace(
            REDACTED, ""
        )


def test_values_come_from_secret_names_and_from_urls() -> None:
    environ = {
        "X_TOKEN": "longenough",
        "URL": "nats://u:inurlpass@h",
        "SHORT_TOKEN": "abc",
        "N": "7",
    }
    assert secret_values(environ) == {"longenough", "u:inurlpass", "inurlpass"}


def test_containers_are_looked_through_and_stay_what_they_are() -> None:
    cleaned = Redactor().value("", {"a": [{"api_key": VALUE, "n": 3}], "flag": True, "none": None})
    assert cleaned == {"a": [{"api_key": REDACTED, "n": 3}], "flag": True, "none": None}


def test_words_of_a_command_lose_the_value_after_a_secret_flag() -> None:
    words = Redactor().words(
        ["worker", "--nats-token", VALUE, "--role", "decode", f"--password={VALUE}"]
    )
    assert words == (
        "worker",
        "--nats-token",
        REDACTED,
        "--role",
        "decode",
        f"--password={REDACTED}",
    )


@pytest.mark.parametrize(
    "unit", ["a", "a.", "-a", "a:", "x=", "?a_", "://", "eyJ-", "a@", "key", '"']
)
def test_awkward_lines_take_no_more_than_a_moment(unit: str) -> None:
    line = unit * (200_000 // len(unit))
    began = time.process_time()
    Redactor(["some-secret-value"]).text(line)
    assert time.process_time() - began < 5


def test_anonymous_text_holds_neither_user_nor_home() -> None:
    text = anonymous("/data/home/bob/x /home/bob/y bob@host bobsled", "bob", "/data/home/bob")
    assert text == "/home/user/x /home/user/y user@host bobsled"
