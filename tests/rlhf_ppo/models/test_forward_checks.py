"""Whatever the architecture: log-probs, values and reference are a plain pass's over each row, or it is refused."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    XLNetConfig,
)

import rlhf_ppo.models.forward.forward_checks
from rlhf_ppo import RewardModel
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.forward_checks import check_forward
from rlhf_ppo.models.forward.kv_cache import PreallocatedLayer, TokenCache
from rlhf_ppo.models.forward.runner import ModelRunner, Sequences
from rlhf_ppo.models.loading import context_length, load_classifier, load_policy, load_trunk
from rlhf_ppo.pipeline.generate import GenerateArgs, generate
from rlhf_ppo.pipeline.labelled.sft import SFTArgs, sft
from rlhf_ppo.rewards.reward_model import text_scores

TESTS = Path(__file__).parents[2]
SWEEP = runpy.run_path(str(TESTS / "architectures.py"))
FAST, KEPT, AGAIN = ("packed", "cache"), ("padded", "cache"), ("right-padded", "no cache")
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

KINDS = {
    "gpt2": FAST,
    "opt": FAST,  # last states narrower than the hidden ones
    "falcon_h1": KEPT,  # keys and recurrent states in one layer
    "mamba": KEPT,  # a cache argument of another name
    "minimax": ("padded", "no cache"),  # a cache of its own
    "openai-gpt": ("padded", "no cache"),  # none
    "rembert": KEPT,  # an output layer of another width than the states
    "roberta": AGAIN,  # positions from the pad id on
    "bart": AGAIN,  # positions that count padding
    "recurrent_gemma": AGAIN,  # recurrent states that padding moves
    "rwkv": AGAIN,
    "moshi": ("padded", "no cache"),  # a window that its cache and its mask see differently
    "llama4_text": KEPT,  # a trunk under another name
    "deepseek_v4": KEPT,  # hidden states of several streams
}


@pytest.mark.parametrize("kind", KINDS)
def test_f_each_kind_of_architecture_is_what_it_is_alone(kind, tmp_path):
    """Prompts of four lengths, rows that end at different times; log-probs, values, reference and the first ratio."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    found = SWEEP["try_variant"](kind, "plain", str(tmp_path), {})
    assert found["outcome"] == "right", found
    assert tuple(found["ways"]) == KINDS[kind]
    assert any("slow" in line for line in found["warned"]) == (KINDS[kind][1] == "no cache")


def test_f_an_adapter_that_peft_puts_on_a_router_is_refused_by_the_models_name(tmp_path):
    """Llama 4's router is a linear layer that returns a tuple; PEFT's all-linear takes it for an ordinary one."""
    found = SWEEP["try_variant"]("llama4_text", "lora", str(tmp_path), {})
    assert found["outcome"] == "refused", found
    assert "peft_config does not work on 'llama4_text'" in found["why"] and "target_modules" in found["why"]


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *(("roberta", "lora"), ("roberta", "separate"), ("bart", "adapter"), ("opt", "separate")),
        *(("mvp", "checkpointing"), ("gpt2", "static")),
    ],
)
def test_f_reference_critics_and_recomputed_layers_too(kind, variant, tmp_path):
    norms = {}
    SWEEP["try_variant"](kind, "plain", str(tmp_path / "plain"), norms)
    assert SWEEP["try_variant"](kind, variant, str(tmp_path / "other"), norms)["outcome"] == "right"


def test_f_static_decoding_that_is_a_little_wrong_is_refused(tmp_path):
    found = SWEEP["try_variant"]("falcon_h1", "static", str(tmp_path), {})
    assert found["outcome"] == "refused" and "FalconH1ForCausalLM" in found["why"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_f_every_architecture_that_builds_tiny_is_right_or_refused(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    sweep = [sys.executable, "-P", str(TESTS / "architectures.py")]
    done = subprocess.run(sweep, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "gemma2", "bloom"])
@pytest.mark.parametrize("bf16", [False, True])
def test_f_ordinary_models_keep_their_fast_ways(make_model, kind, bf16):
    model = ActorCritic(make_model(kind))
    before = ModelRunner(make_model(kind).eval())
    check_forward(model, bf16=bf16)
    runner = model.runner
    assert (runner.packs, runner.head is None) == (before.packs, before.head is None)
    assert runner.pads_left and runner.uses_cache and runner.cache_shrinks


def test_f_rows_stay_where_they_cannot_leave(make_model, monkeypatch):
    def broken(self, beam_idx):
        raise NotImplementedError

    model = ActorCritic(make_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(PreallocatedLayer, "reorder_cache", broken)
        check_forward(model)
    assert model.runner.uses_cache and not model.runner.cache_shrinks


def test_f_windows_are_passed_if_the_run_passes_them():
    def length(longest: int, **settings: Any) -> int:
        return rlhf_ppo.models.forward.forward_checks._length(LlamaConfig(**settings), longest)

    assert length(100) == 8
    assert length(100, sliding_window=20) == 28
    assert length(100, sliding_window=20, attention_chunk_size=40) == 48
    assert length(100, sliding_window=4096) == 8
    assert length(5000, sliding_window=4096) == 4104


# Refused by name


def bert(**settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(BertConfig(vocab_size=30, max_position_embeddings=64, **SIZES, **settings))


def test_f_an_encoder_is_no_policy(make_trainer, tokenizer, tmp_path):
    make_trainer(model=bert(is_decoder=True))
    with pytest.raises(ValueError, match=r"model is 'bert' \(BertLMHeadModel\).* encoder .*is_decoder"):
        make_trainer(model=bert())
    folder = str(tmp_path / "bert")
    bert().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'bert'.*encoder"):
        generate(GenerateArgs(model=folder, prompt=("a",), device="cpu"))
    (tmp_path / "rows.jsonl").write_text('{"text": "once upon a time"}\n' * 4, encoding="utf-8")
    args = SFTArgs(dataset=(str(tmp_path / "rows.jsonl"),), model=folder, output_dir=str(tmp_path / "sft"))
    with pytest.raises(ValueError, match=r"'bert'.*encoder"):
        sft(args)


def test_f_a_separate_critic_must_not_see_the_future_either(make_trainer, make_model):
    with pytest.raises(ValueError, match=r"value_model is 'bert' \(BertModel\).*encoder"):
        make_trainer(model=make_model(), value_model=bert())


def test_f_weights_that_are_not_there_are_named(make_trainer, make_model, tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=30, max_position_embeddings=64, tie_word_embeddings=False, **SIZES)
    trunk, whole = tmp_path / "trunk", tmp_path / "whole"
    model = AutoModelForCausalLM.from_config(config)
    model.config.num_labels = 1
    model.model.save_pretrained(trunk)
    model.save_pretrained(whole)
    for folder in (trunk, whole):
        tokenizer.save_pretrained(folder)
    load_policy(str(whole))
    load_trunk(str(whole))
    load_classifier(str(whole), new_head=True)
    for part in ("model", "ref_model"):
        with pytest.raises(ValueError, match=r"lm_head\.weight.*LlamaForCausalLM"):
            make_trainer(**{"model": str(whole), part: str(trunk)})
    with pytest.raises(ValueError, match=r"score\.weight.*LlamaForSequenceClassification"):
        make_trainer(model=str(whole), reward_funcs=str(whole))
    del model.model.layers[1]
    model.save_pretrained(whole)  # its config still says two layers
    model.config.num_hidden_layers = 2
    model.config.save_pretrained(whole)
    for load in (load_policy, load_trunk, lambda name: load_classifier(name, new_head=True)):
        with pytest.raises(ValueError, match=r"layers\.1\..* and \d+ more"):
            load(str(whole))


def test_f_a_pooler_that_no_token_reads_may_be_missing(tmp_path):
    bert(is_decoder=True).save_pretrained(tmp_path)
    load_trunk(str(tmp_path))
    load_classifier(str(tmp_path), new_head=True)
    with pytest.raises(ValueError, match=r"pooler\.dense"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_f_prompt_learning_is_refused(make_trainer, make_model, tmp_path, kind):
    more = {"encoder_hidden_size": 16} if kind is PromptEncoderConfig else {}
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **more)
    with pytest.raises(ValueError, match=f"peft_config is prompt learning .{config.peft_type.value}.*LoRA"):
        make_trainer(peft_config=config)
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_policy(str(tmp_path / "base")), config)
    with pytest.raises(ValueError, match=r"model's adapter 'default' is prompt learning"):
        make_trainer(model=adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter is prompt learning .{config.peft_type.value}"):
        make_trainer(model=str(tmp_path / "adapter"))


def test_f_weights_that_are_not_numbers_are_refused(make_trainer, make_model):
    model = make_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model is 'gpt2'.*NaN"):
        make_trainer(model=model)


class Noisy(nn.Module):
    """A layer whose second pass over the same input is not its first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.passes = layer, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += torch.is_grad_enabled()
        return self.layer(*args, **kwargs) * (1.0 + 0.5 * (self.passes % 2))


def test_f_layers_that_compute_something_else_the_second_time_are_not_checkpointed(make_trainer, make_model):
    model = make_model("llama")
    model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp)
    make_trainer(model=model)
    with pytest.raises(ValueError, match=r"gradient_checkpointing: model is 'llama'.*gradient changes"):
        make_trainer(model=model, gradient_checkpointing=True)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("this kernel has no backward pass")


def test_f_a_model_that_cannot_learn_is_found_at_set_up(make_trainer, make_model):
    model = make_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: NoBackward.apply(output))
    with pytest.raises(ValueError, match=r"model is 'llama'.*backward pass of the update fails.*no backward pass"):
        make_trainer(model=model)


# The critic's width and the context's length


def test_f_a_value_head_is_as_wide_as_the_states_that_it_reads(make_trainer, make_model, tmp_path):
    sizes = {"vocab_size": 30, "max_position_embeddings": 64, "ffn_dim": 32, "do_layer_norm_before": False}
    config = OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8, **sizes)
    narrow = AutoModelForCausalLM.from_config(config)
    for settings in ({"model": narrow}, {"value_model": narrow}):
        trainer = make_trainer(**settings)
        assert trainer.model.value_head.in_features == 8
        trainer.save_model(str(tmp_path / "run"))
    make_trainer(model=narrow, value_head_from=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="width 8, but the model under it is 16 wide"):
        make_trainer(value_head_from=str(tmp_path / "run"))


def test_f_the_context_length_is_found_under_every_name(make_trainer):
    assert context_length(GPT2Config(n_positions=70)) == 70
    assert context_length(MptConfig(max_seq_len=80)) == 80
    assert context_length(XLNetConfig()) is None  # says -1
    assert context_length(BertConfig(max_position_embeddings=512)) == 512
    # The first position of a text has the number pad_token_id + 1.
    assert context_length(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    config = MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=16, vocab_size=30)
    with pytest.raises(ValueError, match=r"the prompt has 11 tokens, but the model's context leaves room for 10"):
        make_trainer(model=AutoModelForCausalLM.from_config(config), train_dataset=[{"prompt": "dog and cow"}])


def test_f_a_text_as_long_as_the_context_is_read(make_trainer):
    sizes = {"vocab_size": 30, "max_position_embeddings": 20, "pad_token_id": 1, **SIZES}
    model = AutoModelForCausalLM.from_config(RobertaConfig(is_decoder=True, **sizes))
    trainer = make_trainer(model=model, train_dataset=[{"prompt": "once upon a"}], stop_token_ids=(), max_new_tokens=7)
    assert trainer.fixed.room == 11
    assert trainer.rollout(["once upon a"] * 8).mask.all()


# Reward models


def test_f_a_reward_model_that_padding_changes_reads_texts_one_by_one(tokenizer):
    sizes = {"vocab_size": 30, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "initializer_range": 0.3}
    model = AutoModelForSequenceClassification.from_config(XLNetConfig(num_labels=1, **sizes)).eval()
    with pytest.warns(UserWarning, match=r"'XLNetForSequenceClassification' \(xlnet\).*one by one"):
        reward = RewardModel(model, tokenizer)
    texts = ["a", "the cat sat", "no"]
    alone = [reward([""], [text])[0] for text in texts]
    assert reward([""] * 3, texts) == alone
    ids = [tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        together, apart = (text_scores(model, tokenizer, ids, padded=padded) for padded in (True, False))
    assert not torch.allclose(together, apart, atol=1e-3)


# Parts


def test_a_token_cache_pads_on_the_right_and_drops_rows():
    cache = TokenCache()
    ids, mask = left_pad([[5], [6, 7, 8]], torch.device("cpu"))
    found, ends = cache.add(ids, mask)
    assert (found[0, 0], found[1].tolist(), ends.tolist()) == (5, [6, 7, 8], [0, 2])
    found, ends = cache.add(torch.tensor([[9], [10]]), mask)
    assert (found[0, :2].tolist(), found[1].tolist(), ends.tolist()) == ([5, 9], [6, 7, 8, 10], [1, 3])
    cache.reorder_cache(torch.tensor([0]))
    found, ends = cache.add(torch.tensor([[11]]), mask)
    assert (found[0, :3].tolist(), ends.tolist()) == ([5, 9, 11], [2])


def test_aligned_sequences_begin_at_column_0():
    prompts, prompt_mask = left_pad([[5], [6, 7, 8]], torch.device("cpu"))
    answers = torch.tensor([[9, 10, 11], [12, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    sequences, layout = Sequences(prompts, prompt_mask, answers, mask).laid_out()
    ids = sequences.inputs.gather(1, layout.aligned.order)
    assert ids[0, :3].tolist() == [5, 9, 10] and ids[1, :3].tolist() == [6, 7, 8]
    assert ids.flatten()[layout.aligned.before].tolist() == [5, 9, 10, 8]
