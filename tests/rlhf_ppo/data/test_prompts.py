"""Rows and prompts: bad ones are refused with their row, good ones arrive whole, in an order that the seed fixes."""

from __future__ import annotations

import gzip
import json
import re
import warnings

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from rlhf_ppo import RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import ROW_NAME
from rlhf_ppo.data.tokenization import tokenize_prompt

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}. {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def prompt_set(tokenizer):
    def make(rows, room=20, vocab_size=30, **settings) -> PromptSet:
        args = RLHFConfig(output_dir="unused", **settings)
        return PromptSet(rows, tokenizer, args, vocab_size=vocab_size, room=room)

    return make


def rows_of(*prompts) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


def test_fault_1_an_empty_prompt_is_refused_with_its_row(prompt_set):
    with pytest.raises(ValueError, match="train_dataset row 2: the prompt is empty"):
        prompt_set(rows_of("a", "b", "", "c"))
    with pytest.raises(ValueError, match="row 1: a prompt must be text or chat messages, got NoneType"):
        prompt_set(rows_of("a", None))


def test_fault_1_a_prompt_that_is_not_text(prompt_set, tokenizer):
    for bad in (3, ["a", "b"], [], [{"role": "user"}]):
        with pytest.raises(ValueError, match="prompt 0: a prompt must be text or chat messages"):
            tokenize_prompt(bad, tokenizer, "prompt 0")


def test_fault_1_a_rollout_by_hand_names_the_prompts_number(make_trainer):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        make_trainer().rollout(["a", ""])


def test_a_rows_name_is_used_in_messages_and_hidden_from_rewards(prompt_set):
    rows = [{"prompt": prompt, "n": i, ROW_NAME: f"d.jsonl row {i + 5}"} for i, prompt in enumerate(("a", "b", ""))]
    with pytest.raises(ValueError, match=r"^d\.jsonl row 7: the prompt is empty"):
        prompt_set(rows)
    prompts = prompt_set(rows[:2])
    assert prompts.columns == ["n"] and prompts.rows.to_list() == [{"prompt": "a", "n": 0}, {"prompt": "b", "n": 1}]
    with pytest.raises(ValueError, match=r"its columns are \['promt'\]; did you mean 'promt'"):
        prompt_set([{"promt": "a", ROW_NAME: "d.jsonl row 0"}])


def test_fault_2_a_prompt_longer_than_the_context_is_an_error(prompt_set):
    with pytest.raises(ValueError, match="row 1: the prompt has 21 tokens, but the model's context leaves room for 20"):
        prompt_set(rows_of("short", "x" * 21))
    assert len(prompt_set(rows_of("short", "x" * 20))) == 2


def test_fault_2_or_dropped_or_truncated_with_a_count(prompt_set):
    rows = rows_of("short", "x" * 21, "y" * 30)
    with pytest.warns(UserWarning, match="dropped 2 of 3 prompts longer than 20 tokens"):
        assert len(prompt_set(rows, overlong_prompts="drop")) == 1
    with pytest.warns(UserWarning, match="truncated 2 of 3 prompts to their last 20 tokens"):
        assert len(prompt_set(rows, overlong_prompts="truncate")) == 3
    with pytest.raises(ValueError, match="every prompt is longer than the 20 tokens"):
        prompt_set(rows_of("x" * 21), overlong_prompts="drop")


def test_fault_2_truncation_keeps_the_end_and_the_response_fits(make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(overlong_prompts="truncate", max_new_tokens=60, train_dataset=rows_of("abcdefgh"))
    # The context of 64 leaves 4 tokens: "efgh" are ids 7 to 10.
    assert trainer.rollout(["abcdefgh"] * 2).prompt_ids.tolist() == [[7, 8, 9, 10]] * 2


def test_truncation_keeps_the_token_that_begins_a_sequence(make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(overlong_prompts="truncate", max_new_tokens=60, train_dataset=rows_of("abcdefgh"))
    assert trainer.rollout(["<|endoftext|>abcdefgh"] * 2).prompt_ids.tolist() == [[0, 8, 9, 10]] * 2


def test_fault_2_a_response_longer_than_the_context(make_trainer):
    with pytest.raises(ValueError, match="max_new_tokens=64 leaves no room for a prompt in the model's context"):
        make_trainer(max_new_tokens=64)


def test_fault_6_a_misspelt_prompt_column(prompt_set):
    with pytest.raises(ValueError, match=r"no column 'prompt', its columns are .*'promt'.*did you mean 'promt'"):
        prompt_set([{"promt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"its columns are \['x'\]$"):
        prompt_set([{"x": "a"}])


def test_fault_7_a_chat_without_a_chat_template_stops_before_any_model_is_loaded(make_trainer, monkeypatch):
    def load(model):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rlhf_ppo.training.models.load_models.load_policy", load)
    with pytest.raises(ValueError, match="row 0: the prompt is a chat, but the tokenizer has no chat template"):
        make_trainer(train_dataset=rows_of([{"role": "user", "content": "hi"}]))


def test_chats_go_through_the_template_ready_for_a_reply(make_trainer, tokenizer):
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "tell me"}]] * 4
    seen: list = []

    def reward(prompts, completions, **_):
        seen.extend(prompts)
        return [float(len(prompt[0]["content"])) for prompt in prompts]

    trainer = make_trainer(train_dataset=rows_of(*chats), reward_funcs=reward)
    rollout = trainer.rollout(chats)
    read = tokenizer.decode(rollout.prompt_ids[0][rollout.prompt_mask[0]])
    assert read == "user hi. assistant "
    assert seen == chats  # the reward gets messages, not the template's text
    trainer.train()
    assert trainer.iteration == 2


def test_fault_8_an_empty_data_set(prompt_set, tmp_path):
    for empty in ([], Dataset.from_dict({"prompt": []})):
        with pytest.raises(ValueError, match="train_dataset has no rows"):
            prompt_set(empty)
    file = tmp_path / "empty.jsonl"
    file.touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        load_rows(str(file))
    (tmp_path / "header.csv").write_text("prompt,n\n")
    with pytest.raises(ValueError, match=r"header\.csv has no rows"):
        load_rows(str(tmp_path / "header.csv"))


def test_fault_8_a_data_set_smaller_than_a_batch_cycles_with_a_warning(make_trainer):
    trainer = make_trainer(train_dataset=rows_of("a", "b", "c"))
    with pytest.warns(UserWarning, match=r"3 prompts, fewer than the 8 of a rollout .*each rollout repeats some"):
        trainer.train()
    assert trainer.episodes == 16


def test_fault_10_a_token_id_beyond_the_vocabulary(prompt_set):
    # z is id 28.
    with pytest.raises(ValueError, match="row 1: token id 28 is not in the model's vocabulary of 28"):
        prompt_set(rows_of("ay", "az"), vocab_size=28)


def test_each_epoch_has_every_row_once_in_an_order_fixed_by_the_seed(prompt_set):
    names = [f"p{letter}" for letter in "abcdefg"]
    prompts = prompt_set(rows_of(*names), seed=3)
    dealt = [prompt for number in range(7) for prompt in prompts.batch(number, 4).prompts]
    passes = [dealt[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(one) == names for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    # Any batch can be dealt again by its number, and another seed deals another order.
    assert prompts.batch(5, 4).prompts == dealt[20:24]
    assert prompt_set(rows_of(*names), seed=3).batch(5, 4).prompts == dealt[20:24]
    assert prompt_set(rows_of(*names), seed=4).batch(0, 7).prompts != passes[0]


def test_extra_columns_reach_the_reward_beside_their_prompts(make_trainer):
    rows = [{"prompt": letter, "answer": f"{letter}{letter}", "number": i} for i, letter in enumerate("abcdefgh")]
    seen: list[tuple] = []

    def reward(prompts, completions, answer, number):
        seen.extend(zip(prompts, answer, number, strict=True))
        return [float(n) for n in number]

    make_trainer(train_dataset=rows, eval_dataset=rows[:3], reward_funcs=reward).train()
    assert len(seen) == 3 + 16 + 3
    assert all(answer == prompt * 2 and rows[n]["prompt"] == prompt for prompt, answer, n in seen)


def test_rows_from_files(tmp_path):
    rows = [{"prompt": "a b", "n": 1}, {"prompt": "c", "n": 2}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write((tmp_path / "d.jsonl").read_text())
    (tmp_path / "f.csv").write_text("prompt,n\na b,1\nc,2\n")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "g.parquet"))
    for name in ("d.jsonl", "e.jsonl.gz", "f.csv", "g.parquet"):
        assert load_rows(str(tmp_path / name)).to_list() == rows
    with pytest.raises(FileNotFoundError, match=r"missing\.csv does not exist"):
        load_rows(str(tmp_path / "missing.csv"))
    assert load_rows(str(tmp_path / "d.jsonl"), "train[1:]").to_list() == rows[1:]
    assert load_rows(str(tmp_path / "d.jsonl"), "train[1:]+train[:1]").to_list() == rows[::-1]
    for split in ("test", "train+test", "trains"):
        with pytest.raises(ValueError, match=rf"split='{re.escape(split)}': .*d.jsonl is a single file"):
            load_rows(str(tmp_path / "d.jsonl"), split)
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"unknown ending '.txt'"):
        load_rows(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("some/data", "train_dataset must be a data set of known length or a list of mappings.*got str"),
        (["Once"], "train_dataset must be a data set of known length or a list of mappings.*got list"),
        (IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])), "got IterableDataset"),
        (DatasetDict(train=Dataset.from_list([{"prompt": "a"}])), r"has the splits \['train'\]: pass one of them"),
    ],
)
def test_other_types_of_data_sets_are_refused(make_trainer, rows, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=rows)


def test_rows_may_come_from_a_generator(make_trainer):
    assert len(make_trainer(train_dataset=({"prompt": word} for word in ("a", "no"))).train_prompts) == 2
