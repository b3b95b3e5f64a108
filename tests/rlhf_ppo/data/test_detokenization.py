"""Text in pieces: a prompt with its completion is what the whole sequence decodes to, whatever the tokenizer."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rlhf_ppo.data.detokenization import Before, GrowingText, TextPieces
from rlhf_ppo.data.tokenization import encode_text
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.pipeline.generate import GenerateArgs, generate
from rlhf_ppo.pipeline.labelled.sft import Example, encode_examples
from rlhf_ppo.rewards.functions import StepRewards

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
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    for name, part in parts.items():
        setattr(core, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(core.decoder, decoders.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if byte_fallback:
        learned = json.loads(core.to_str())["model"]
        vocabulary = learned["vocab"] | {f"<0x{i:02X}>": len(learned["vocab"]) + i for i in range(256)}
        merges = [tuple(pair) for pair in learned["merges"]]
        core.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
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
    "words, tidied": lambda: wrapped(
        word_level(WORDS, pre_tokenizers.Whitespace(), None), clean_up_tokenization_spaces=True
    ),
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
LOSE_SPACES = ("word piece", "words, tidied", "suffixes", "words")
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
def test_a_few_preceding_tokens_are_enough(numbers, cut, special):
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
def test_text_is_encoded_as_a_continuation(kind):
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


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_beyond_the_vocabulary_has_no_text(kind):
    """Embeddings are often rounded up, so that a model can sample an id that no tokenizer knows."""
    tokenizer = built(kind)
    pieces, beyond = TextPieces(tokenizer), max(tokenizer.get_vocab().values()) + 1
    ids = encode_text(tokenizer, "lily and her friend", ended=False)
    head, tail = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    assert pieces.text([beyond]) == "" and pieces.text([*ids, beyond]) == pieces.text(ids)
    assert pieces.decode(Before([*head, beyond]), [beyond, *tail, beyond + 7]) == pieces.decode(Before(head), tail)
    growing, plain = GrowingText(pieces, Before([*head, beyond])), GrowingText(pieces, Before(head))
    for token in tail:
        assert [growing.add(beyond), growing.add(token)][-1] == plain.add(token)


# In a run: what is written is what the ids say


@pytest.fixture
def words() -> Any:
    """A tokenizer like Llama 2's: the first space of a text goes unsaid, <s> comes before it."""
    tokenizer = wrapped(fallback(prefix=True))
    around(tokenizer, "<s> $A")
    return tokenizer


def around(tokenizer: Any, template: str) -> None:
    """Let the tokenizer put special tokens around a text."""
    named = [(name, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=named)


def behind(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in the middle of a sequence."""
    head, ids = (tokenizer(given, add_special_tokens=False)["input_ids"] for given in ("x", f"x{text}"))
    assert ids[: len(head)] == head
    return ids[len(head) :]


def rows_of(*rows: list[int]) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [1] * (width - len(row)) for row in rows]


def test_rewards_and_stop_strings_read_the_generated_text(make_trainer, make_model, words, script):
    """A first space is part of a completion and of a stop string; a step's end counts its characters."""
    seen: list[str] = []

    def judge(prompts, completions, **columns):
        seen.extend(completions)
        return [StepRewards([(len(" friend"), 1.0)]), 0.5, 0.0]

    trainer = make_trainer(
        model=make_model(vocab_size=len(words)),
        processing_class=words,
        reward_funcs=judge,
        stop_token_ids=(words.eos_token_id,),
        stop_strings=(" dog",),
        max_new_tokens=8,
    )
    said = [[*behind(words, text), 1] for text in (" friend said", "s saw", " dog was long")]
    script(rows_of(*said))
    prompts = ["lily and her", "tom and the shark", "a"]
    rollout = trainer.rollout(prompts)
    assert seen == rollout.completions == [" friend said", "s saw", ""]
    ids = [row[keep].tolist() for row, keep in zip(rollout.response_ids, rollout.mask, strict=True)]
    assert ids[:2] == said[:2]  # the record is the sampled ids
    assert ids[2] == behind(words, " dog")
    for i, prompt in enumerate(prompts[:2]):
        whole = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist() + ids[i]
        assert words.decode(whole, skip_special_tokens=True) == prompt + rollout.completions[i]
    friend = len(behind(words, " friend")) - 1
    assert rollout.token_scores is not None and rollout.token_scores[0].nonzero().flatten().tolist() == [friend]
    labels = [row["label"] for row in trainer.explain(rollout).rows if row["sequence"] == 0]
    assert "".join(ast.literal_eval(label) for label in labels) == " friend said</s>"


@pytest.mark.parametrize("reply", [" said tom.", "the dog"])
def test_turns_and_replies_are_one_text(make_trainer, make_model, words, script, reply):
    trainer = make_trainer(
        model=make_model(vocab_size=len(words)),
        processing_class=words,
        reward_funcs=lambda p, completions, **_: [StepRewards([(0, 7, 1.0), (1, 5, 2.0)])],  # " friend", " long"
        respond=lambda messages: reply,
        stop_token_ids=(words.eos_token_id,),
        stop_strings=(" day",),
        max_turns=2,
        max_new_tokens=8,
        total_episodes=1,
        rollout_batch_size=1,
        num_minibatches=1,
    )
    script([[*behind(words, " friend was"), 1]], [behind(words, " long. day")])
    rollout = trainer.rollout(["lily and her"])
    ids = rollout.prompt_ids[0].tolist() + rollout.response_ids[0][rollout.real[0]].tolist()
    assert words.decode(ids, skip_special_tokens=True) == f"lily and her friend was{reply} long. day"
    assert rollout.completions == [f" friend was{reply} long."]
    assert [m["content"] for m in rollout.conversations[0]] == ["lily and her", " friend was", reply, " long."]
    assert rollout.response_ids[0][~rollout.mask[0]].tolist() == behind(words, reply)
    first, second = len(behind(words, " friend")), len(behind(words, " long"))
    places = rollout.mask[0].nonzero().flatten()[[first - 1, 0]].tolist()
    places[1] = int((rollout.mask[0] & (rollout.turns[0] == 1)).nonzero()[second - 1])
    assert rollout.token_scores[0].nonzero().flatten().tolist() == places


def test_generate_writes_what_training_read(make_model, words, script, tmp_path):
    model = make_model(vocab_size=len(words))
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    script(rows_of([*behind(words, " friend dog"), 4], [*behind(words, "s saw"), 1]))
    prompts = ("lily and her", "tom and the shark")
    args = GenerateArgs(model=str(tmp_path), prompt=prompts, max_new_tokens=4, stop_strings=(" dog",), device="cpu")
    assert generate(args) == [(prompts[0], " friend"), (prompts[1], "s saw")]


# Special tokens


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["tom saw", "<s>tom saw", "tom saw</s>", "<s>tom saw</s>"])
def test_special_tokens_stand_once_at_either_end(words, template, text):
    around(words, template)
    inner = words("tom saw", add_special_tokens=False)["input_ids"]
    start = [0] * (template.startswith("<s>") or text.startswith("<s>"))
    end, ended = [1] * text.endswith("</s>"), [1] * (text.endswith("</s>") or template.endswith("</s>"))
    assert encode_text(words, text, ended=False) == [*start, *inner, *end]
    assert encode_text(words, text, ended=True) == [*start, *inner, *ended]
    # Cut to fit, a text loses its beginning, but no special token of the tokenizer's own.
    if template == "<s> $A </s>":
        assert encode_text(words, text, ended=True, limit=4) == [0, *inner[-2:], 1]
    # sft: nothing between prompt and completion, one end of text.
    completion = " friend said"
    (row,) = encode_examples([Example(text, completion, "")], words, 64, "train", vocab_size=999)
    assert row["input_ids"] == [*start, *inner, *end, *behind(words, completion), 1]
    (row,) = encode_examples([Example("", text, "")], words, 64, "train", vocab_size=999)
    assert row["input_ids"] == [*start, *inner, 1]
    (row,) = encode_examples([Example("tom", " saw</s>", "")], words, 64, "train", vocab_size=999)
    assert row["input_ids"][-2:] == [*behind(words, " saw")[-1:], 1]


@pytest.mark.parametrize("template", ["[{{ c }}] ", "[{{ c }}]", "<s>[{{ c }}]<|turn|>"])
def test_sft_teaches_an_answer_as_the_template_writes_it(words, template):
    """Its ids are those that it has in the chat, the template's space before it included."""
    user = template.replace("{{ c }}", "{{ m.content | trim }}").removesuffix(" ")
    space = " " * template.endswith(" ")
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + space + "{{ m.content | trim }}</s>"
        "{% endif %}{% endfor %}"
    )
    prompt = [{"role": "user", "content": "tom saw"}]
    chat = words.apply_chat_template([*prompt, {"role": "assistant", "content": "the dog"}], return_dict=False)
    for answer in ("the dog", " the dog"):
        (row,) = encode_examples([Example(prompt, answer, "")], words, 64, "train", vocab_size=999)
        assert row["input_ids"] == chat, words.convert_ids_to_tokens(row["input_ids"])


def test_the_end_of_a_turn_that_the_template_sets_apart_is_not_doubled(words):
    """Llama 2's template writes " </s>" behind an answer; the policy has written </s> itself."""
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %} {{ m.content }} </s>"
        "{% endif %}{% endfor %}"
    )
    told = ([{"role": "user", "content": "tom saw"}], {"role": "assistant", "content": " the dog"})
    reply = [{"role": "user", "content": "a cat"}]
    glue = words("<s>[a cat]", add_special_tokens=False)["input_ids"]
    assert chat_reply_ids(words, *told, reply, words.eos_token_id) == glue
    assert chat_reply_ids(words, *told, reply, None)[-len(glue) - 1 :] == [words.eos_token_id, *glue]
