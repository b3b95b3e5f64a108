"""Stop strings are found however tokens split them, and limits that contradict each other are refused."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.generation.stop_strings import StopStringDetector, cut_at_stop_string

STOPS = (0, 12, 16)


def test_a_stop_string_ends_a_response_and_its_text_is_cut(make_trainer, script, prompts):
    """Golden: "cd" is 5 6. Tokens up to the one that completes it are actions; text is cut before it."""
    trainer = make_trainer(
        max_new_tokens=4,
        rollout_batch_size=4,
        stop_strings=("cd", "z"),
        stop_token_ids=(),
        missing_eos_penalty=1.0,
        reward_funcs=lambda p, completions, **_: [float(len(text)) for text in completions],
    )
    script([[7, 5, 6, 9], [5, 7, 6, 5], [28, 9, 9, 9], [5, 5, 5, 6]])
    rollout = trainer.rollout(prompts[:4])
    assert rollout.mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert rollout.response_ids.tolist() == [[7, 5, 6, 0], [5, 7, 6, 5], [28, 0, 0, 0], [5, 5, 5, 6]]
    assert rollout.finished.tolist() == [True, False, True, True]
    assert rollout.completions == ["e", "cedc", "", "cc"]
    assert rollout.scores.tolist() == [1, 4, 0, 2]
    metrics = trainer.step(rollout)
    assert metrics["response/eos_fraction"] == pytest.approx(3 / 4)
    assert all(math.isfinite(value) for value in metrics.values())


def test_strings_are_found_however_tokens_split_text_and_characters():
    """A byte-level tokenizer splits characters too; the response ends at the first token whose text completes one."""
    from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer

    pairs = train_tokenizer(["the cat sat on the mat"] * 50, 280, 64)
    for text, stops in (
        ("the cat sat on", ("t s",)),
        ("a \u00e9t\u00e9 \U0001f600 x", ("\U0001f600",)),
        ("one\n\ntwo", ("\n\n",)),
        ("never here", ("zz", "the mat")),
        ("\u20ac\u20ac", ("\u20ac",)),
    ):
        ids = pairs(text, add_special_tokens=False)["input_ids"]
        expected = [any(s in pairs.decode(ids[: n + 1]) for s in stops) for n in range(len(ids))]
        detector = StopStringDetector(TextPieces(pairs), stops, [Before()] * 2)
        found = [bool(detector.add(torch.tensor([i]), torch.tensor([1]))) for i in ids]
        first = expected.index(True) if True in expected else None
        assert (found.index(True) if True in found else None) == first, text


def test_a_space_that_a_token_alone_would_lose_counts():
    """Tokenizers of the Llama kind write the space into the word, and drop it where a text begins."""
    core = Tokenizer(models.WordLevel({"?": 0, "\u2581the": 1, "\u2581cat": 2}, unk_token="?"))
    core.decoder = decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=core)
    assert words.decode([1, 2]) == "the cat" and words.decode([2]) == "cat"
    detector = StopStringDetector(TextPieces(words), ("e c",), [Before()])
    assert [bool(detector.add(torch.tensor([i]), torch.tensor([0]))) for i in (2, 1, 2)] == [False, False, True]


def test_the_cost_of_a_token_does_not_grow_with_the_response(tokenizer, monkeypatch):
    detector, sizes = StopStringDetector(TextPieces(tokenizer), ("zzz",), [Before()]), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **settings: sizes.append(len(ids)) or decode(ids, **settings))
    for _ in range(100):
        detector.add(torch.tensor([5]), torch.tensor([0]))
    assert max(sizes) <= 8


def test_bytes_that_never_make_a_character_do_not_hold_it_up(monkeypatch):
    from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer

    pairs = train_tokenizer(["the cat"] * 50, 280, 64)
    broken = pairs("\u00e9", add_special_tokens=False)["input_ids"][0]  # the first of two bytes
    assert pairs.decode([broken]) == "\ufffd"
    pieces, sizes = TextPieces(pairs), []
    detector = StopStringDetector(pieces, ("cat",), [Before()])
    text = pieces.text
    monkeypatch.setattr(pieces, "text", lambda ids: sizes.append(len(ids)) or text(ids))
    ids = [broken] * 50 + pairs(" cat", add_special_tokens=False)["input_ids"]
    assert [bool(detector.add(torch.tensor([i]), torch.tensor([0]))) for i in ids][-1]
    assert max(sizes) <= 8


def test_cut_at_stop_string():
    assert cut_at_stop_string("a. b! c.", ("!", ".")) == "a"
    assert cut_at_stop_string("abc", ("x",)) == "abc" == cut_at_stop_string("abc", ())
    assert cut_at_stop_string("xabc", ("x",)) == ""


def test_stop_strings_end_turns_too(make_trainer, script):
    trainer = make_trainer(
        respond=lambda messages: "?",
        max_turns=2,
        max_new_tokens=3,
        stop_strings=(".",),
        stop_token_ids=(),
        rollout_batch_size=2,
    )
    script([[5, 29, 9], [29, 9, 9]])
    rollout = trainer.rollout(["a", "b"])
    assert rollout.completions == ["c.?c", ".?"]
    assert rollout.conversations[0][1::2] == [{"role": "assistant", "content": "c"}] * 2


# Settings


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 6}, ("min_new_tokens=9", "max_new_tokens=6")),
        ({"min_new_tokens": 1, "stop_token_ids": ()}, ("min_new_tokens=1", "stop_token_ids")),
        ({"stop_strings": ("x",), "generation": "static"}, ("stop_strings=('x',)", "generation='static'")),
        ({"stop_strings": "x"}, ("stop_strings", "'x'")),
        ({"stop_strings": ("x", "")}, ("stop_strings", "non-empty")),
        ({"min_new_tokens": -1}, ("min_new_tokens", "0 or more")),
    ],
)
def test_fault_30_limits_that_contradict_are_named(make_trainer, settings, both):
    with pytest.raises(ValueError) as error:
        make_trainer(**settings)
    assert all(name in str(error.value) for name in both)
