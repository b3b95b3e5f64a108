"""Supervised fine-tuning: new models and given ones, what is learned and what is masked, bad settings and data."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, MixtralConfig, T5Config

from rlhf_ppo.data.examples import Example, collate, encode_examples, read_examples
from rlhf_ppo.generation.stop_tokens import stop_tokens
from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer
from rlhf_ppo.pipeline.labelled.sft import SFTArgs, nats_per_token, sft
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.logs.run_directory import RunLockedError, run_lock

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 20


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)))
    return str(file)


@pytest.fixture
def architecture(tmp_path):
    config = GPT2Config(vocab_size=290, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    config.save_pretrained(tmp_path / "shape")
    return str(tmp_path / "shape" / "config.json")


@pytest.fixture
def quick(tmp_path):
    def args(**settings) -> SFTArgs:
        small = {"output_dir": str(tmp_path / "out"), "learning_rate": 0.02, "warmup_steps": 0, "batch_size": 8}
        return SFTArgs(**{**small, "num_epochs": 2.0, "eval_fraction": 0.1, **settings})

    return args


def test_a_new_model_is_saved_and_trained_further(quick, data, architecture, tmp_path):
    first = sft(quick(dataset=data, architecture=architecture, num_epochs=6.0))
    # A uniform model over 290 tokens has log 290 = 5.67 nats a token; the three sentences soon cost much less.
    assert first["eval/loss_nats_per_token"] < 0.6 * math.log(290)
    assert first["eval/perplexity"] == pytest.approx(math.exp(first["eval/loss_nats_per_token"]))
    folder = tmp_path / "out"
    assert not [f for f in folder.rglob("*") if f.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        ends = model(ids).logits[0].softmax(-1)[:, tokenizer.eos_token_id]
    # It has learned where a text ends: the final token was a target.
    assert ends[-1] > 0.5 and ends[-1] == ends.max()

    second = sft(quick(dataset=data, model=str(folder), output_dir=str(tmp_path / "next"), save_dtype="bfloat16"))
    assert second["eval/loss_nats_per_token"] < first["eval/loss_nats_per_token"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "next", dtype="auto").dtype == torch.bfloat16


def test_padding_is_masked_and_the_final_end_of_text_is_not():
    """Rows end in id 0, which also pads the batch: labels tell them apart by length."""
    batch = collate([{"input_ids": [5, 6, 0], "labels": [5, 6, 0]}, {"input_ids": [7, 0], "labels": [7, 0]}])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 0], [7, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_rows_longer_than_the_context_are_truncated(quick, architecture, tmp_path):
    """The shape reads 32 tokens, max_length's default is far above."""
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"text": "the cat " * 40 + chr(97 + i)}) + "\n" for i in range(8)))
    result = sft(quick(dataset=str(file), architecture=architecture, num_epochs=1.0))
    assert math.isfinite(result["eval/loss_nats_per_token"])


def test_same_seed_same_weights(quick, data, architecture, tmp_path):
    results = [
        sft(quick(dataset=data, architecture=architecture, num_epochs=0.3, output_dir=str(tmp_path / str(i)), seed=7))
        for i in range(2)
    ]
    assert results[0] == results[1]
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"step 2: the loss is nan and its gradient's norm nan, so nothing was saved; lower learning_rate"),
        # One step, and no next one to notice.
        ({"num_epochs": 0.01}, r"after the last step \(1\), on the held-out rows: the loss is nan"),
        # Weights of about 1e5 keep the loss finite, and are beyond float16.
        ({"learning_rate": 1e5, "num_epochs": 0.01, "save_dtype": "float16"}, r"is non-finite in float16"),
    ],
)
def test_a_diverging_run_says_where_and_saves_nothing(quick, data, make_model, tokenizer, tmp_path, settings, message):
    make_model().save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(NonFiniteGradientError, match=message):
        sft(quick(dataset=data, model=str(tmp_path / "out"), **{"learning_rate": 1e30, **settings}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_perplexity_beyond_the_largest_float_is_infinite(quick, data, architecture, monkeypatch):
    """e^710 is beyond the largest float."""
    monkeypatch.setattr("rlhf_ppo.pipeline.labelled.sft.nats_per_token", lambda *_: 710.0)
    assert sft(quick(dataset=data, architecture=architecture, num_epochs=0.1))["eval/perplexity"] == math.inf


def test_bad_settings_are_named(quick, data, architecture):
    with pytest.raises(ValueError, match=r"exactly one of model .* and architecture"):
        quick(dataset=data)
    with pytest.raises(ValueError, match=r"exactly one of model .* and architecture"):
        quick(dataset=data, model="m", architecture=architecture)
    with pytest.raises(ValueError, match=r"eval_fraction must be between 0 and 1, got 1\.5"):
        quick(dataset=data, model="m", eval_fraction=1.5)
    for name, value in (
        ("max_length", 0),
        ("batch_size", 0),
        ("num_epochs", 0.0),
        ("num_epochs", float("inf")),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
            quick(dataset=data, model="m", **{name: value})


def test_a_missing_text_column_names_the_closest_before_anything_is_trained(quick, data, architecture):
    with pytest.raises(ValueError, match=r"no column 'txt', its columns are \['text', 'n'\]; did you mean 'text'"):
        sft(quick(dataset=data, architecture=architecture, text_column="txt"))


def test_one_row_cannot_be_split(quick, architecture, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="has 1 row; at least 2 are needed"):
        sft(quick(dataset=str(file), architecture=architecture))


def test_a_folder_in_use_and_a_file_are_refused_before_any_model_work(quick, data, tmp_path):
    (tmp_path / "out").mkdir()
    with run_lock(tmp_path / "out"), pytest.raises(RunLockedError, match="in use by another run"):
        sft(quick(dataset=data, model="nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        sft(quick(dataset=data, model="nowhere", output_dir=str(tmp_path / "file")))


def test_a_model_whose_tokenizer_has_no_end_of_text_is_refused(quick, data, make_model, tokenizer, tmp_path):
    tokenizer.eos_token = None
    make_model().save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="end-of-text token"):
        sft(quick(dataset=data, model=str(tmp_path / "endless")))


def test_the_tokenizer_is_lossless_for_any_text():
    tokenizer = train_tokenizer(TEXTS, 280, 64)
    assert len(tokenizer) <= 280
    for text in ("the cat", "  two  spaces\n", "Zażółć 🙂", "<tag> & 'quote' ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


# Prompts with completions, conversations, preferences

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a.{% endif %}"
)


def test_only_the_completion_and_its_end_are_learned(tokenizer):
    """One token a character: "the " is read, "cat" and end of text (id 0) are targets, as PPO would sample them."""
    rows = Dataset.from_list([{"prompt": "the ", "chosen": "cat"}])
    args = SFTArgs(dataset=("x",), output_dir="o", model="m", prompt_column="prompt", completion_column="chosen")
    (row,) = encode_examples(read_examples(rows, args), tokenizer, 64, "train", vocab_size=30)
    assert row["input_ids"] == [*tokenizer("the cat")["input_ids"], 0]
    assert row["labels"] == [-100] * 4 + [*tokenizer("cat")["input_ids"], 0]


def test_conversations_learn_the_last_answer_after_the_generation_prompt(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    args = SFTArgs(dataset=("x",), output_dir="o", model="m", text_column="messages")
    split = SFTArgs(dataset=("x",), output_dir="o", model="m", prompt_column="prompt", completion_column="completion")
    (whole,) = read_examples(Dataset.from_list([{"messages": chat}]), args)
    assert whole == read_examples(Dataset.from_list([{"prompt": chat[:1], "completion": chat[1:]}]), split)[0]
    (row,) = encode_examples([whole], tokenizer, 64, "train", vocab_size=30)
    assert tokenizer.decode(row["input_ids"][:-1]) == "u.hi a.yo"
    assert [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100] == [
        *tokenizer("yo")["input_ids"],
        0,
    ]


def test_a_prompt_that_fills_the_length_is_left_out_with_a_count(tokenizer):
    with pytest.warns(UserWarning, match="train: left out 1 of 2 rows whose prompt fills the 4 tokens"):
        rows = encode_examples(
            [Example("abcde", "f", "row 0"), Example("a", "b", "row 1")], tokenizer, 4, "train", vocab_size=30
        )
    assert len(rows) == 1
    with pytest.raises(ValueError, match="every prompt fills max_length=4"):
        encode_examples([Example("abcde", "f", "row 0")], tokenizer, 4, "train", vocab_size=30)


def test_a_token_id_beyond_the_vocabulary_is_named_with_its_row(tokenizer):
    """z is id 28."""
    with pytest.raises(ValueError, match="row 1: token id 28 is not in the model's vocabulary of 28"):
        encode_examples([Example("a", "y", "row 0"), Example("a", "z", "row 1")], tokenizer, 64, "train", vocab_size=28)


def test_completions_are_learned_end_to_end(quick, make_model, tokenizer, tmp_path, learning_seed):
    """After any prompt the answer is "yes": a tenth of a nat per token is soon enough, though prompts are random."""
    make_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    file = tmp_path / "pairs.jsonl"
    words = [f"{a}{b} " for a in "abcdefgh" for b in "klmnopqr"]
    file.write_text("".join(json.dumps({"prompt": w, "chosen": "yes", "rejected": "no"}) + "\n" for w in words))
    columns = {"prompt_column": "prompt", "completion_column": "chosen"}
    result = sft(quick(dataset=(str(file),), model=str(tmp_path / "m"), num_epochs=8.0, seed=learning_seed, **columns))
    assert result["eval/loss_nats_per_token"] < 0.1


@pytest.mark.parametrize(("named", "after"), [(7, [0, 7]), ([7, 8], [0, 7, 8]), ([7, 0], [7, 0]), (0, 0)])
def test_responses_end_with_what_sft_taught(quick, data, make_model, tokenizer, tmp_path, named, after):
    """The generation config is asked first where a response ends: the end token that was taught stands there."""
    model = make_model()
    model.generation_config.eos_token_id = named
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sft(quick(dataset=data, model=str(tmp_path / "base"), num_epochs=0.1))
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert saved.eos_token_id == after
    stops = stop_tokens(str(tmp_path / "out"), model.config, tokenizer)
    assert tokenizer.eos_token_id == 0 and 0 in stops


def test_bad_prompt_and_completion_settings_are_named(quick, data, tokenizer):
    with pytest.raises(ValueError, match="prompt_column and completion_column go together"):
        quick(dataset=data, model="m", prompt_column="text")
    with pytest.raises(ValueError, match="dataset_weights has 2 weights for 1 data sets"):
        quick(dataset=data, model="m", dataset_weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="text_column='story' has no effect beside completion_column='chosen'"):
        quick(dataset=data, model="m", prompt_column="prompt", completion_column="chosen", text_column="story")
    rows = Dataset.from_list([{"prompt": "a", "completion": ""}])
    args = quick(dataset=data, model="m", prompt_column="prompt", completion_column="completion")
    with pytest.raises(ValueError, match="row 0, completion: the answer is empty"):
        read_examples(rows, args)
    chat = [Example("", "a", "row 0"), Example([{"role": "user", "content": "hi"}], "yo", "row 1")]
    with pytest.raises(ValueError, match="row 1: the prompt is a chat, but the tokenizer has no chat template"):
        encode_examples(chat, tokenizer, 64, "train", vocab_size=30)


def test_a_bad_row_has_its_number_in_the_file_whatever_is_held_out(quick, make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"prompt": f"p{i}", "completion": "" if i == 7 else "a"} for i in range(10)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_column": "prompt", "completion_column": "completion", "eval_fraction": 0.5}
    for seed in (0, 1):  # the row is in the one part or in the other
        with pytest.raises(ValueError, match=r"d\.jsonl row 7, completion: the answer is empty"):
            sft(quick(dataset=(str(tmp_path / "d.jsonl"),), model=str(tmp_path / "m"), seed=seed, **columns))


def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(make_model, tokenizer):
    """Rows of very different length: means of batches, weighted by rows, would depend on the batches."""
    model = make_model().eval()
    texts = ["a", "the cat sat on the mat", "", "a cat and a dog", "on"]
    rows = encode_examples([Example("", text, "a row") for text in texts], tokenizer, 64, "test", vocab_size=30)
    assert len(rows) == 4  # an empty text is an end of text alone, which nothing predicts
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    for batch_size in (1, 3, 64):
        assert nats_per_token(model, rows, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_the_held_out_loss_leaves_out_a_router_loss(tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            output_router_logits=True,
            router_aux_loss_coef=10.0,
        )
    )
    rows = encode_examples([Example("", "the cat", "row 0")], tokenizer, 32, "test", vocab_size=30)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)
    wanted = -sum(float(logprobs[0, t, ids[0, t + 1]]) for t in range(ids.shape[1] - 1)) / (ids.shape[1] - 1)
    assert nats_per_token(model, rows, batch_size=4) == pytest.approx(wanted, abs=1e-4)


def test_a_warm_up_longer_than_the_run_is_shortened_with_a_line(quick, data, architecture, capsys):
    # 54 rows in batches of 8, twice: 14 steps, of which 1 is warm-up; without that the rate would end at a hundredth.
    metrics = sft(quick(dataset=data, architecture=architecture, warmup_steps=1000))
    assert metrics["eval/loss_nats_per_token"] < 0.9 * math.log(290)
    assert "warmup_steps=1000 is more than the run's 14 optimizer steps: shortened to 1\n" in capsys.readouterr().out
    sft(quick(dataset=data, architecture=architecture, warmup_steps=1000, num_epochs=0.1, quiet=True))
    assert "warmup_steps" not in capsys.readouterr().out


def test_a_disk_that_fills_leaves_the_old_model_and_the_new_one_elsewhere(
    quick, data, architecture, tmp_path, monkeypatch
):
    args = quick(dataset=data, architecture=architecture)
    sft(args)
    old = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "rescue").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "rescue"))
    usage, looks = shutil.disk_usage(tmp_path), []

    def free(path):
        looks.append(path)
        return usage._replace(free=10 if len(looks) == 2 else 10**12)  # full at the second look, the save's own

    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(OSError, match=r"out cannot be written: it needs .*were saved in .*rescue.* instead"):
        sft(dataclasses.replace(args, seed=1))
    assert (tmp_path / "out" / "previous-1" / "model.safetensors").read_bytes() == old
    (kept,) = (tmp_path / "rescue").iterdir()
    AutoModelForCausalLM.from_pretrained(kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match=r"the model that is saved into .*out needs"):
        sft(args)


def test_encoder_decoders_are_refused_as_model_and_as_shape(quick, data, tmp_path):
    T5Config(vocab_size=290, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    for source in ({"model": str(tmp_path / "t5")}, {"architecture": str(tmp_path / "t5" / "config.json")}):
        with pytest.raises(ValueError, match="is an encoder-decoder model"):
            sft(quick(dataset=data, **source))


def test_bad_architectures_are_named(quick, data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.json: there is no such file"):
        sft(quick(dataset=data, architecture=str(tmp_path / "nope.json")))
    GPT2Config(vocab_size=30, n_positions=32, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match=r"vocab_size=30, but every byte and end of text make 257 tokens: raise it"):
        sft(quick(dataset=data, architecture=str(tmp_path / "few" / "config.json")))
