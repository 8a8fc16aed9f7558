from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import byte_level_tokenizer, metaspace_tokenizer
from trtllm_workers.ingress.detokenize import ByteDecoder, TextTable, WindowDecoder

BYTES = byte_level_tokenizer()
WORDS = metaspace_tokenizer()
TEXTS = [
    "Hello world",
    "  spaces  before and   after  ",
    "日本語のテキスト 中文",
    "🎉👩‍👩‍👧‍👦 naïve café",
    "line\nline\r\n\ttab",
    '"quoted" \\ back\\slash \u0007 \x7f',
]


def table(tokenizer: Tokenizer) -> TextTable:
    written = json.loads(tokenizer.to_str())
    special = [one["id"] for one in written["added_tokens"] if one["special"]]
    return TextTable(tokenizer.get_vocab(with_added_tokens=True), special, 400)


TABLE = table(BYTES)


def window(context: tuple[int, ...] = (), skip: bool = True) -> WindowDecoder:
    skipped = frozenset({0, 1, 2} if skip else ())
    return WindowDecoder(
        lambda token_ids: str(WORDS.decode(token_ids, skip_special_tokens=skip)), skipped, context
    )


def all_of(decoder: ByteDecoder | WindowDecoder, token_ids: list[int]) -> tuple[list[str], str]:
    increments = [decoder.feed(token_id) for token_id in token_ids]
    return increments, decoder.flush()


byte_ids = st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=60)
# Runs of byte tokens that are no characters: a whole decode takes back what was sure before.
word_ids = st.lists(
    st.integers(0, WORDS.get_vocab_size() - 1).filter(
        lambda token_id: not (WORDS.id_to_token(token_id) or "").startswith("<0x")
    ),
    max_size=60,
)


@given(byte_ids, st.booleans())
@settings(max_examples=300, deadline=None)
def test_increments_of_random_byte_level_ids_add_up_to_the_whole_decode(
    token_ids: list[int], skip: bool
) -> None:
    increments, rest = all_of(ByteDecoder(TABLE, skip_special_tokens=skip), token_ids)
    whole = BYTES.decode(token_ids, skip_special_tokens=skip)
    assert "".join(increments) + rest == whole
    assert ByteDecoder(TABLE, skip_special_tokens=skip).all(token_ids) == whole


@given(word_ids)
@settings(max_examples=300, deadline=None)
def test_increments_of_random_metaspace_ids_add_up_to_the_whole_decode(
    token_ids: list[int],
) -> None:
    increments, rest = all_of(window(), token_ids)
    assert "".join(increments) + rest == WORDS.decode(token_ids)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_text_comes_back_and_no_increment_holds_half_a_character(text: str) -> None:
    for decoder, tokenizer in (
        (ByteDecoder(TABLE, skip_special_tokens=False), BYTES),
        (window(skip=False), WORDS),
    ):
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        increments, rest = all_of(decoder, token_ids)
        whole = tokenizer.decode(token_ids, skip_special_tokens=False)
        assert "".join(increments) + rest == whole
        if "\ufffd" not in text:
            assert all("\ufffd" not in one for one in [*increments, rest])


@pytest.mark.parametrize("text", TEXTS)
def test_both_kinds_return_awkward_texts(text: str) -> None:
    byte_ids = BYTES.encode(text).ids
    increments, rest = all_of(ByteDecoder(TABLE, skip_special_tokens=True), byte_ids)
    assert "".join(increments) + rest == text
    word_ids = WORDS.encode(text, add_special_tokens=False).ids
    increments, rest = all_of(window(), word_ids)
    assert "".join(increments) + rest == WORDS.decode(word_ids)


def test_a_character_of_several_tokens_comes_out_whole_with_its_last_one() -> None:
    token_ids: list[int] = BYTES.encode("🦊").ids
    assert len(token_ids) > 2
    decoder = ByteDecoder(TABLE, skip_special_tokens=True)
    assert not any(decoder.feed(token_id) for token_id in token_ids[:-1])
    assert decoder.pending
    assert decoder.feed(token_ids[-1]) == "🦊"
    assert not decoder.pending


def test_bytes_that_never_became_a_character_are_replaced_at_the_end() -> None:
    token_ids = BYTES.encode("🦊").ids[:-1]
    increments, rest = all_of(ByteDecoder(TABLE, skip_special_tokens=True), token_ids)
    assert not any(increments)
    assert rest == BYTES.decode(token_ids) == "\ufffd"


def test_byte_fallback_characters_come_out_whole() -> None:
    token_ids = WORDS.encode("🦊", add_special_tokens=False).ids
    assert len(token_ids) > 4, "not in the vocabulary, so made of byte tokens"
    increments, rest = all_of(window(), token_ids)
    assert [one for one in increments if one] == ["🦊"]
    assert rest == ""


def test_only_the_first_token_loses_its_leading_space() -> None:
    token_ids = WORDS.encode("the dog the dog", add_special_tokens=False).ids
    increments, _ = all_of(window(), token_ids)
    assert "".join(increments) == "the dog the dog"
    assert increments[0] == "the"


def test_an_answer_that_continues_a_prompt_keeps_its_leading_space() -> None:
    prompt = WORDS.encode("Hello world", add_special_tokens=False).ids
    answer = WORDS.encode("the dog", add_special_tokens=False).ids
    increments, rest = all_of(window(context=tuple(prompt)), answer)
    assert "".join(increments) + rest == " the dog"


def test_fragments_are_json_of_the_pieces_and_missing_where_a_decoder_is_needed() -> None:
    for token_id, (piece, fragment) in enumerate(zip(TABLE.pieces, TABLE.fragments, strict=True)):
        if fragment is not None:
            assert json.loads(b'"%b"' % fragment) == piece.decode()
            assert token_id not in TABLE.special
    assert all(TABLE.fragments[token_id] is None for token_id in TABLE.special)
    assert TABLE.fragments[BYTES.encode("🦊").ids[0]] is None


def test_ids_outside_the_vocabulary_are_no_text() -> None:
    decoder = ByteDecoder(TABLE, skip_special_tokens=True)
    assert decoder.feed(100_000) == ""
    assert decoder.all([100_000]) == ""
    assert TABLE.piece(100_000) == b""


def test_bytes_without_end_that_form_no_character_do_not_pile_up() -> None:
    lone = WORDS.get_vocab()["<0xFF>"]
    decoder = window()
    increments = [decoder.feed(lone) for _ in range(200)]
    assert "".join(increments) + decoder.flush() == "\ufffd" * 200
    assert increments.index(next(one for one in increments if one)) < 32
