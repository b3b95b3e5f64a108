"""Reward models: the loss in closed form, what is saved scores as it was trained, calibration, and bad preferences."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import warnings

import pytest
import torch
from transformers import T5Config

from rlhf_ppo import RewardModel
from rlhf_ppo.cli import main
from rlhf_ppo.data.preferences import Preference, read_preferences, split_by_prompt
from rlhf_ppo.pipeline.evaluation.intervals import calibration
from rlhf_ppo.pipeline.labelled.bradley_terry import bradley_terry_loss, preference_metrics
from rlhf_ppo.pipeline.labelled.reward_training import RewardTrainingArgs, train_reward_model
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.logs.run_directory import LOCK_FILE, RunLockedError, run_lock


@pytest.fixture
def base(tmp_path, make_model, tokenizer) -> str:
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path):
    def file(rows: list[dict], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return file


def pairs(count: int = 120) -> list[dict]:
    """Pairs whose better answer has an x in it."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choices("abcdefg", k=draw.randint(2, 5)))

    return [
        {"prompt": f"{word()} ", "chosen": f"{word()}x{word()}", "rejected": f"{word()}y{word()}", "margin": 0.5}
        for _ in range(count)
    ]


@pytest.fixture
def quick(tmp_path, base):
    def args(dataset, **settings) -> RewardTrainingArgs:
        small = {"output_dir": str(tmp_path / "rm"), "model": base, "learning_rate": 1e-2, "device": "cpu"}
        files = (dataset,) if isinstance(dataset, str) else dataset
        return RewardTrainingArgs(dataset=files, **{**small, "precision": "fp32", "quiet": True, **settings})

    return args


# Loss


def test_equal_scores_cost_log_2_and_pull_apart_by_half():
    """d/dc -log sigmoid(c - r) = sigmoid(c - r) - 1, which is -1/2 at c = r."""
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    loss.sum().backward()
    assert chosen.grad.tolist() == [-0.5] * 3 and rejected.grad.tolist() == [0.5] * 3


def test_the_margin_is_subtracted_inside_the_sigmoid():
    """A gap equal to its margin costs log 2; without it, log(1 + e^-2)."""
    scores = torch.tensor([1.5]), torch.tensor([-0.5])
    assert bradley_terry_loss(*scores, margin=torch.tensor([2.0])).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(*scores).item() == pytest.approx(math.log1p(math.exp(-2)))


def test_centering_fixes_the_constant_that_the_comparison_leaves_open():
    """Adding 3 to both scores changes the plain loss by nothing and the centred one by 0.1 * 6^2."""
    plain = bradley_terry_loss(torch.tensor([1.0]), torch.tensor([-1.0]))
    moved = bradley_terry_loss(torch.tensor([4.0]), torch.tensor([2.0]))
    centred = bradley_terry_loss(torch.tensor([4.0]), torch.tensor([2.0]), centering=0.1)
    assert moved.item() == pytest.approx(plain.item())
    assert centred.item() - moved.item() == pytest.approx(0.1 * 36)


# Calibration


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error():
    """Gap log 3 says 3/4: of four such pairs three go to the chosen answer."""
    gap = math.log(3.0)
    (row,) = calibration(torch.tensor([gap, gap, -gap, gap]))
    assert (row["pairs"], row["predicted"], row["observed"]) == (4, pytest.approx(0.75), 0.75)
    assert row["low"] < 0.75 < row["high"]
    metrics = preference_metrics(torch.tensor([gap, gap, 0.0, gap]), torch.tensor([0.0, 0.0, gap, 0.0]))
    assert metrics["calibration_error"] == pytest.approx(0, abs=1e-6) and metrics["accuracy"] == 0.75


def test_the_calibration_error_of_an_overconfident_model():
    """Half of 52 pairs are sure and right half the time, off by 1/2; the others are ties and known to be: 1/4."""
    gap = torch.tensor([20.0, 0.0, -20.0, 0.0] * 13)
    unsure, sure = calibration(gap)
    assert (unsure["predicted"], unsure["observed"]) == (0.5, 0.5)
    assert (sure["pairs"], sure["predicted"], sure["observed"]) == (26, pytest.approx(1), 0.5)
    metrics = preference_metrics(gap, torch.zeros(52))
    assert metrics["calibration_error"] == pytest.approx(0.25, abs=1e-6) and metrics["accuracy"] == 0.5


def test_bins_are_ten_at_most():
    assert [row["pairs"] for row in calibration(torch.linspace(-1, 1, 1000))] == [100] * 10


# Training


@pytest.mark.parametrize("pad", ["none", "eos", "own"])
def test_reward_model_scores_as_the_trained_model_did(quick, write, base, tokenizer, tmp_path, pad):
    """Texts that end in end-of-text: with pad == eos, a model that looks for the last id that is not pad is early."""
    if pad != "none":
        tokenizer.pad_token = "<|endoftext|>" if pad == "eos" else "?"
        tokenizer.save_pretrained(base)
    rows = [{**row, "chosen": row["chosen"] + "<|endoftext|>"} for row in pairs(40)]
    metrics = train_reward_model(quick(write(rows), batch_size=7))
    reward = RewardModel(str(tmp_path / "rm"))
    _, held_out = split_by_prompt(
        [Preference(json.dumps(r["prompt"]), r["prompt"] + r["chosen"], r["prompt"] + r["rejected"], 0) for r in rows],
        0.1,
        0,
    )
    chosen = reward([""] * len(held_out), [pair.chosen for pair in held_out])
    assert sum(chosen) / len(chosen) == pytest.approx(metrics["chosen_score"], abs=1e-5)
    # The score head at the very last token, end-of-text, of the text alone: no pooling and no pad id has a say in it.
    ids = torch.tensor([tokenizer(held_out[0].chosen)["input_ids"]])
    assert ids[0, -1] == tokenizer.eos_token_id and ids[0, -2] != tokenizer.eos_token_id
    by_token = reward.model.score(reward.model.base_model(input_ids=ids).last_hidden_state)[0, :, 0]
    assert chosen[0] == pytest.approx(by_token[-1].item(), abs=1e-5)
    assert abs(by_token[-1] - by_token[-2]) > 1e-3


def test_it_learns_what_the_pairs_have_in_common_and_reports_it(quick, write, pictures, tmp_path, learning_seed):
    settings = {"num_epochs": 4, "margin_column": "margin", "eval_fraction": 0.2, "seed": learning_seed}
    metrics = train_reward_model(quick(write(pairs(300)), **settings))
    assert metrics["accuracy"] > 0.9 and metrics["loss"] < 0.4
    assert (metrics["train_pairs"] + metrics["eval_pairs"], metrics["cut_pairs"]) == (300, 0)
    saved = json.loads((tmp_path / "rm" / "reward_metrics.json").read_text())
    assert saved["accuracy"] == metrics["accuracy"]
    assert sum(row["pairs"] for row in saved["calibration"]) == metrics["eval_pairs"]
    assert (tmp_path / "rm" / "calibration.png").stat().st_size > 1000
    x, y = RewardModel(str(tmp_path / "rm"))(["abc "] * 2, ["abxcd", "abycd"])
    assert x > y


def test_long_texts_keep_their_end_in_training_and_in_use(quick, write, tmp_path):
    """18 of 20 letters are the same; only what max_length=6 keeps tells the answers apart."""
    rows = [{"prompt": f"{chr(97 + i % 5)}" * (14 + i), "chosen": "aaax", "rejected": "aaay"} for i in range(24)]
    with pytest.warns(UserWarning, match="24 of 24 pairs have a text longer than 6 tokens and keep its end"):
        metrics = train_reward_model(quick(write(rows), max_length=6, num_epochs=8))
    assert metrics["cut_pairs"] == 24 and metrics["accuracy"] == 1
    reward = RewardModel(str(tmp_path / "rm"))
    assert reward(["a" * 20], ["abcdef"]) == reward(["z"], ["abcdef"])


def test_lora_saves_an_adapter_that_scores_as_it_was_trained(quick, write, tmp_path):
    metrics = train_reward_model(quick(write(pairs(60)), lora_rank=2))
    files = {file.name for file in (tmp_path / "rm").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files and "model.safetensors" not in files
    settings = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and "score" in settings["modules_to_save"]
    reward = RewardModel(str(tmp_path / "rm"))
    rows = [Preference(json.dumps(r["prompt"]), r["prompt"] + r["chosen"], "", 0) for r in pairs(60)]
    texts = [pair.chosen for pair in split_by_prompt(rows, 0.1, 0)[1]]
    scores = reward([""] * len(texts), texts)
    assert sum(scores) / len(texts) == pytest.approx(metrics["chosen_score"], abs=1e-5)


def test_a_folder_in_use_and_a_file_are_refused_before_anything_moves(quick, write, tmp_path):
    """With metrics.jsonl the folder is another run's, whose files would be set aside."""
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "metrics.jsonl").touch()
    with run_lock(tmp_path / "rm"), pytest.raises(RunLockedError, match="in use by another run"):
        train_reward_model(quick(write(pairs(20)), model="nowhere"))
    assert {file.name for file in (tmp_path / "rm").iterdir()} == {"metrics.jsonl", LOCK_FILE}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        train_reward_model(quick(write(pairs(20)), model="nowhere", output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learning_rate": 1e30},
            r"after 16 pairs: the loss is .* and its gradient's norm .*, so nothing was saved; lower learning_rate",
        ),
        ({"learning_rate": 1e30, "batch_size": 200}, r"after all 90 pairs a held-out score is non-finite"),
        (
            {"learning_rate": 1e6, "batch_size": 200, "save_dtype": "float16"},
            r"after all 90 pairs \S+ is non-finite in float16",
        ),
    ],
)
def test_a_diverging_run_says_where_and_saves_nothing(quick, write, tmp_path, settings, message):
    """In one batch of all pairs there is no next step to notice; weights of about 1e6 are beyond float16."""
    with pytest.raises(NonFiniteGradientError, match=message):
        train_reward_model(quick(write(pairs(100)), warmup_steps=0, **settings))
    assert {file.name for file in (tmp_path / "rm").iterdir()} == {LOCK_FILE, "run.json", "metrics.jsonl"}


def test_same_seed_same_weights(quick, write, tmp_path):
    file = write(pairs(40))
    results = [train_reward_model(quick(file, output_dir=str(tmp_path / str(i)), seed=3)) for i in range(2)]
    assert results[0] == results[1]
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]


# Preferences


def test_no_prompt_is_on_both_sides_of_the_split():
    rows = [Preference(f"p{i % 10}", f"c{i}", f"r{i}", 0.0) for i in range(40)]
    train, held_out = split_by_prompt(rows, 0.2, seed=0)
    assert len(train) == 32 and len(held_out) == 8
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


def test_chats_and_texts_become_what_the_reward_model_reads(tokenizer):
    from datasets import Dataset

    user, good, bad = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "assistant", "content": "no"},
    )
    names = {"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"}

    def read(row: dict, **columns) -> Preference:
        return read_preferences(Dataset.from_list([row]), tokenizer, **{**names, **columns})[0]

    chat = read({"prompt": [user], "chosen": "yes", "rejected": "no"})
    assert chat.chosen == RewardModel._text(type("R", (), {"tokenizer": tokenizer})(), [user], "yes")
    assert chat == read({"prompt": [user], "chosen": [good], "rejected": [bad]})
    assert chat == read({"chosen": [user, good], "rejected": [user, bad]}, prompt_column=None)
    assert read({"prompt": "a ", "chosen": "b", "rejected": "c"}).chosen == "a b"
    assert read({"chosen": "b", "rejected": "c"}, prompt_column=None).rejected == "c"


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "p", "chosen": "a", "rejected": "b"}, r"no column 'prompt'.*did you mean 'promt'"),
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, r"no column 'chosen'.*did you mean 'choosen'"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "row 0, chosen: the answer is empty"),
        (
            {"prompt": "p", "chosen": 3, "rejected": 4},
            "an answer must be text or chat messages, got int",
        ),
        ({"prompt": "p", "chosen": CHAT, "rejected": CHAT}, "the last message must be the assistant's"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the same text in all 3 rows"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "3 usable pairs of 1 prompt: at least 2 prompts"),
    ],
)
def test_fault_6_bad_preferences_are_one_line_and_exit_code_2(write, base, tmp_path, capsys, row, message):
    import re

    flags = ["--dataset", write([row] * 3), "--model", base, "--output-dir", str(tmp_path / "rm")]
    assert main(["reward", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "rm" / "model.safetensors").exists()


def test_an_encoder_decoder_is_refused(write, quick, tmp_path):
    T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"model .*t5 is an encoder-decoder model \(t5\).* start from a decoder"):
        train_reward_model(quick(write(pairs()), model=str(tmp_path / "t5")))


def test_a_disk_that_fills_leaves_the_model_elsewhere(write, quick, tmp_path, monkeypatch):
    (tmp_path / "rescue").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "rescue"))
    usage, looks = shutil.disk_usage(tmp_path), []

    def free(path):
        looks.append(path)
        return usage._replace(free=10 if len(looks) == 2 else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(OSError, match=r"cannot be written: it needs .*were saved in .*rescue.* instead"):
        train_reward_model(quick(write(pairs()), num_epochs=1))
    (kept,) = (tmp_path / "rescue").iterdir()
    assert len(RewardModel(str(kept))(["abc "], ["x"])) == 1
    assert not (tmp_path / "rm" / "model.safetensors").exists()


def test_a_warm_up_longer_than_the_run_is_shortened_with_a_line(write, quick, capsys):
    # 112 pairs in batches of 16, 7 steps an epoch: the default warm-up of 10 steps would be the whole run.
    train_reward_model(quick(write(pairs(124)), num_epochs=1, batch_size=16, warmup_steps=10, quiet=False))
    assert "warmup_steps=10 is more than the run's 7 optimizer steps: shortened to 0" in capsys.readouterr().out


def test_an_empty_file_and_contradicting_settings(write, quick, capsys, tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        train_reward_model(quick(write([])))
    for wrong, message in (
        ({"eval_fraction": 1.0}, "eval_fraction must be between 0 and 1"),
        ({"dataset_weights": (1.0, 2.0)}, "dataset_weights has 2 weights for 1 data sets"),
        ({"lora_rank": 0}, "lora_rank must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            quick("x.jsonl", **wrong)


def test_a_bad_row_of_a_mixture_is_named_with_its_data_set(quick, write):
    files = write(pairs(4)), write([*pairs(2), {**pairs(1)[0], "chosen": ""}], "others.jsonl")
    with pytest.raises(ValueError, match=r"others\.jsonl row 2, chosen: the answer is empty"):
        train_reward_model(quick(files))


def test_a_token_id_beyond_the_vocabulary_is_named_with_its_row(quick, write, make_model, base):
    """x is id 26, y 27, z 28."""
    make_model(vocab_size=28).save_pretrained(base)
    with pytest.raises(ValueError, match=r"pairs\.jsonl row 4: token id 28 is not in the model's vocabulary of 28"):
        train_reward_model(quick(write([*pairs(4), {"prompt": "a", "chosen": "z", "rejected": "y"}])))


def test_identical_answers_are_left_out_with_a_count(quick, write):
    rows = pairs(20)
    rows[3]["rejected"] = rows[3]["chosen"]
    with pytest.warns(UserWarning, match="skipped 1 of 20 rows"):
        assert train_reward_model(quick(write(rows)))["train_pairs"] == 17


def test_margins_must_be_numbers(quick, write):
    with pytest.raises(ValueError, match="row 0: margin must be a finite number, got 'big'"):
        train_reward_model(quick(write([{**row, "margin": "big"} for row in pairs(4)]), margin_column="margin"))


def test_a_clean_run_warns_of_nothing(quick, write):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_reward_model(quick(write(pairs(20))))
