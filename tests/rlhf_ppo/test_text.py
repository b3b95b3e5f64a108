"""Text in pieces: a prompt with its completion is what the whole sequence decodes to, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rlhf_ppo.text import Before, GrowingText, TextPieces, encode_text

TEXTS = ("lily and her friend said tom. a dog, a cat ;\n the day was long", "tom saw the shark, the shark saw him")
CORPUS = TEXTS * 20
SPECIAL = ["<s>", "</s>", "<unk>", "<|turn|>"]
WORDS = sorted({word for text in CORPUS for word in text.replace(".", " .").replace(",", " ,").split()})


def wrapped(core: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )


def bpe(*, byte_fallback: bool = False, **parts: Any) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback))
    for name, part in parts.items():
        setattr(core, name, part)
    names = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(core.decoder, decoders.ByteLevel) else []
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL + names, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return core


def metaspace(scheme: str) -> Tokenizer:
    return bpe(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme), decoder=decoders.Metaspace(prepend_scheme=scheme)
    )


def byte_level(*, prefix: bool) -> Tokenizer:
    return bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoder=decoders.ByteLevel())


def fallback(*, prefix: bool) -> Tokenizer:
    """Like Llama 2's with a prefix, like Gemma's without."""
    spaces = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return bpe(
        byte_fallback=True,
        normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces,
        pre_tokenizer=pre_tokenizers.Split("\u2581", "merged_with_next"),
        decoder=decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts),
    )


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return core


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    )
    return core


def suffixes() -> Tokenizer:
    """Like the first GPT's: a word's last token ends with </w>."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False),
    )
    return core


def word_level(tokens: list[str], split: Any, decoder: Any) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *tokens])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    if decoder is not None:
        core.decoder = decoder
    return core


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": lambda: wrapped(byte_level(prefix=False)),
    "byte level, prefix space": lambda: wrapped(byte_level(prefix=True)),
    "metaspace": lambda: wrapped(metaspace("always")),
    "metaspace, first": lambda: wrapped(metaspace("first")),
    "metaspace, never": lambda: wrapped(metaspace("never")),
    "byte fallback, prefix space": lambda: wrapped(fallback(prefix=True)),
    "byte fallback": lambda: wrapped(fallback(prefix=False)),
    "unigram": lambda: wrapped(unigram()),
    "word piece": lambda: wrapped(word_piece()),
    "word piece, tidied": lambda: wrapped(word_piece(), clean_up_tokenization_spaces=True),
    "suffixes": lambda: wrapped(suffixes()),
    "characters": lambda: wrapped(
        word_level(sorted(set("".join(CORPUS))), pre_tokenizers.Split(Regex("[^~]"), "isolated"), decoders.Fuse())
    ),
    "words": lambda: wrapped(word_level(WORDS, pre_tokenizers.Whitespace(), None)),
    "spaces across tokens": lambda: wrapped(  # what one token becomes depends on its neighbours
        word_level(
            ["a", "b", " ", "."],
            pre_tokenizers.Split(Regex("."), "isolated"),
            decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", ".")]),
        )
    ),
    "bytes in Python": ByT5Tokenizer,
}
LOSE_SPACES = ("word piece", "word piece, tidied", "suffixes", "words")
"""These have no ids for a space at the end of a text, nor for a word without a space before it."""


@cache
def built(kind: str) -> Any:
    return KINDS[kind]()


def decoded(tokenizer: Any, ids: list[int], *, special: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_its_completion_are_what_the_whole_decodes_to(kind):
    tokenizer = built(kind)
    pieces = TextPieces(tokenizer)
    for text in ("lily and her friend said tom.", "a  dog,\n\na cat", " the day", "\u00e9t\u00e9 \U0001f600 was long"):
        ids = encode_text(tokenizer, text, ended=False)
        whole = decoded(tokenizer, ids, special=False)
        for cut in range(len(ids) + 1):
            start = decoded(tokenizer, ids[:cut], special=False)
            if whole.startswith(start):  # no character is cut in two
                assert start + pieces.decode(Before(ids[:cut]), ids[cut:]) == whole, (kind, cut)


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=12), cut=st.integers(0, 12), special=st.booleans())
@example(numbers=[0, 3, 7, 7], cut=2, special=False)
def test_a_few_tokens_before_a_piece_are_enough(numbers, cut, special):
    """Any ids, special ones and broken characters among them: the same as behind all of the sequence, at each token."""
    for kind in KINDS:
        tokenizer = built(kind)
        ids = [number % len(tokenizer) for number in numbers]
        pieces = TextPieces(tokenizer, special=special)
        head, tail = ids[:cut], ids[cut:]
        start = decoded(tokenizer, head, special=special)
        growing = GrowingText(pieces, Before(head))
        for n in range(1, len(tail) + 1):
            whole = decoded(tokenizer, head + tail[:n], special=special)
            same = next((i for i in range(len(start)) if start[i : i + 1] != whole[i : i + 1]), len(start))
            assert pieces.decode(Before(head), tail[:n]) == whole[same:], (kind, ids, n)
            assert growing.add(tail[n - 1]) == whole[same:], (kind, ids, n)


SPACED = [kind for kind in KINDS if kind != "spaces across tokens"]


@pytest.mark.parametrize("kind", SPACED)
def test_text_is_encoded_behind_what_lies_before_it(kind):
    tokenizer = built(kind)
    pieces, spelled = TextPieces(tokenizer), TextPieces(tokenizer, special=True)
    for prompt in ("lily and her", "tom saw", "a dog."):
        ids = encode_text(tokenizer, prompt, ended=False)
        before = decoded(tokenizer, ids, special=False)
        for text in (" friend said", "friend", " a  cat", "\nthe", " said "):
            new = spelled.encode(Before(ids), text)
            whole = decoded(tokenizer, ids + new, special=False)
            if kind in LOSE_SPACES:
                assert whole.split() == f"{before} {text}".split(), (prompt, text)
            else:
                assert whole == before + text, (prompt, text)
            assert before + pieces.decode(Before(ids), new) == whole


@pytest.mark.parametrize("kind", SPACED)
def test_a_prompt_that_ends_in_a_space(kind):
    """Some tokenizers drop that space, and put one before the next word: one of the two is enough."""
    tokenizer = built(kind)
    pieces = TextPieces(tokenizer)
    prompt = "lily and her "
    ids = encode_text(tokenizer, prompt, ended=False)
    before = pieces.before(ids, prompt)
    friend = pieces.encode(before, "friend")
    assert prompt + pieces.decode(before, friend) == "lily and her friend"
    growing = GrowingText(pieces, before)
    assert [growing.add(token) for token in friend][-1] == "friend"
