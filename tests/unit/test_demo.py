"""The demo model: its files, its tokenizer and template, its FAQ, and a few of its answers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trtllm_workers.demo import DEMO_MODEL_NAME, demo_model_path
from trtllm_workers.demo import chat as chat_format
from trtllm_workers.demo.faq import load_faq, load_unseen, parse_faq
from trtllm_workers.demo.paraphrase import all_wordings, plain

MODEL = demo_model_path()

TEXTS = [
    "",
    " ",
    "What is prefill?",
    "  two spaces,\ttab\r\nand lines\n\n",
    "Grüße, naïve café",
    "日本語のテキスト と 한국어",
    "🚀👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 combining, \u200b zero width, \ufeff mark, \u202e override",
    "\x00\x01\x7f control",
    "".join(map(chr, range(0x20, 0x2000, 7))),
    "\U0010ffff \ue000 private",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_demo_files_are_all_there_and_small() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert 1e6 < sum(files.values()) < 4e6
    assert DEMO_MODEL_NAME == "demo"


def test_demo_imports_nothing_heavy() -> None:
    code = (
        "import sys, trtllm_workers.demo as d; d.demo_model_path();"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_names_a_llama_with_bf16_weights_and_one_end_token() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == generation["eos_token_id"] == chat_format.END_ID
    assert all(config[key] % 32 == 0 for key in ("vocab_size", "hidden_size", "intermediate_size"))


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", [*TEXTS, "<|user|>Hello<|end|><|assistant|>"])
def test_fastokens_gives_the_same_ids(tokenizer: Tokenizer, text: str) -> None:
    fastokens = pytest.importorskip("fastokens")
    fast = fastokens.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert list(fast.encode(text, add_special_tokens=False).ids) == expected


def test_tokenizer_is_a_plain_byte_level_bpe_with_every_byte() -> None:
    spec = json.loads((MODEL / "tokenizer.json").read_text())
    assert spec["model"]["type"] == "BPE"
    assert spec["normalizer"] is None
    assert spec["post_processor"] is None
    assert spec["pre_tokenizer"]["type"] == spec["decoder"]["type"] == "ByteLevel"
    assert sum(len(token) == 1 for token in spec["model"]["vocab"]) == 256
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert special == {token: at for at, token in enumerate(chat_format.SPECIAL_TOKENS)}


def test_chat_template_renders_as_trained() -> None:
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    assert config["eos_token"] == chat_format.END
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    template = ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == chat_format.render(messages, add_generation_prompt=True)
    assert rendered == (
        "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi.<|end|>"
        "<|user|>Bye<|end|><|assistant|>"
    )
    without = template.render(messages=messages, add_generation_prompt=False)
    assert rendered == without + chat_format.ASSISTANT


def test_chat_template_takes_content_in_parts() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    template = ImmutableSandboxedEnvironment().from_string(chat_format.CHAT_TEMPLATE)
    assert template.render(messages=[message]) == "<|user|>Hello<|end|>"


def test_faq_has_chapters_and_short_answers(tokenizer: Tokenizer) -> None:
    entries = load_faq()
    assert 250 <= len(entries) <= 350
    assert len({entry.chapter for entry in entries}) >= 10
    assert len({entry.question for entry in entries}) == len(entries)
    long = {e.question for e in entries if len(tokenizer.encode(e.answer).ids) > 70}
    assert long == set()


def test_faq_parser_reads_wordings_and_joins_lines() -> None:
    (entry,) = parse_faq("intro\n\n## One\n\n### A?\nAlso asked: B? | C?\n\nFirst,\nsecond.\n")
    assert (entry.chapter, entry.question, entry.also) == ("One", "A?", ("B?", "C?"))
    assert entry.answer == "First, second."


def test_faq_parser_names_a_question_without_answer() -> None:
    with pytest.raises(ValueError, match=r"chapter 'One': question 'A\?' has no answer"):
        parse_faq("## One\n### A?\nAlso asked: B?\n")


def test_every_wording_belongs_to_one_question() -> None:
    entries = load_faq()
    wordings = all_wordings(entry.wordings for entry in entries)
    flat = [plain(wording) for each in wordings for wording in each]
    assert len(set(flat)) > 5000
    owners: dict[str, int] = {}
    for index, each in enumerate(wordings):
        assert all(owners.setdefault(plain(wording), index) == index for wording in each)


def test_unseen_questions_are_unseen() -> None:
    trained = {plain(w) for each in all_wordings(e.wordings for e in load_faq()) for w in each}
    assert [question for question, _ in load_unseen() if plain(question) in trained] == []


def test_demo_answers_from_its_faq(tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    model = llama.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    answers = {entry.question: entry.answer for entry in load_faq()}
    for question in ("What is prefill?", "How do I start the server?"):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.encode(chat_format.render(messages, add_generation_prompt=True)).ids
        answer: list[int] = []
        past = None
        while chat_format.END_ID not in answer and len(answer) < 80:
            with torch.inference_mode():
                out = model(torch.tensor([ids]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            ids = [int(out.logits[0, -1].argmax())]
            answer += ids
        assert tokenizer.decode(answer) == answers[question]
        assert answer[-1] == chat_format.END_ID
