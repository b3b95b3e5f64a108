"""Tiny language models, tokenizers and trainers, built on the fly: nothing is downloaded."""

from __future__ import annotations

import itertools
import os
import string
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.core import ValueScale
from rlhf_ppo.generation import sampling
from rlhf_ppo.models.actor_critic import ActorCritic

logging.disable_progress_bar()  # models that tests save would draw them among what commands print

EOS = "<|endoftext|>"
CHARACTERS = [EOS, "?", " ", *string.ascii_lowercase, "."]  # ids 0, 1, 2, 3..28, 29
PROMPTS = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why not go"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, end of text is id 0, no pad token."""
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, bos_token=EOS, model_max_length=64)


def tiny_config(kind: str, vocab_size: int) -> PretrainedConfig:
    """A two-layer model, 16 wide; weights are drawn wide enough that context and position matter."""
    wide: dict[str, Any] = {"vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    usual = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    match kind:
        case "gpt2":  # with its usual dropout of 0.1, so that a forgotten eval() shows
            return GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **wide)
        case "llama":
            return LlamaConfig(intermediate_size=32, num_key_value_heads=1, **usual, **wide)
        case "qwen2":
            return Qwen2Config(intermediate_size=32, num_key_value_heads=1, **usual, **wide)
        case "gpt_neox":
            return GPTNeoXConfig(intermediate_size=32, rotary_pct=0.5, **usual, **wide)
        case "opt":
            return OPTConfig(ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, pad_token_id=1, **usual, **wide)
        case "bloom":
            return BloomConfig(hidden_size=16, n_layer=2, n_head=2, **wide)
        case "mistral":  # each token sees itself and three before it
            return MistralConfig(intermediate_size=32, num_key_value_heads=1, sliding_window=4, **usual, **wide)
        case "gemma":
            return GemmaConfig(intermediate_size=32, num_key_value_heads=1, head_dim=8, **usual, **wide)
        case "gemma2":  # caps on its logits and attention scores, every other layer with a window
            caps = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 4}
            return Gemma2Config(intermediate_size=32, num_key_value_heads=1, head_dim=8, **caps, **usual, **wide)
    raise ValueError(kind)


@pytest.fixture
def make_model():
    """``make_model(kind="gpt2", vocab_size=30, seed=0)``: the same seed gives the same weights."""

    def make(kind: str = "gpt2", vocab_size: int = len(CHARACTERS), seed: int = 0) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size))

    return make


_SERVED: list[Path] = []


@pytest.fixture
def served_model(tmp_path_factory, make_model, tokenizer) -> Path:
    """A folder with a tiny Llama and its tokenizer, for a server; nobody changes it."""
    if not _SERVED:
        _SERVED.append(tmp_path_factory.mktemp("served") / "llama")
        make_model("llama").save_pretrained(_SERVED[0])
        tokenizer.save_pretrained(_SERVED[0])
    return _SERVED[0]


@pytest.fixture
def make_classifier():
    """``make_classifier(kind="gpt2", vocab_size=30, num_labels=1)``: a reward model."""

    def make(kind: str = "gpt2", vocab_size: int = len(CHARACTERS), num_labels: int = 1, seed: int = 5) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = tiny_config(kind, vocab_size)
            config.num_labels = num_labels
            return AutoModelForSequenceClassification.from_config(config)

    return make


def early_letters(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Share of the characters before n in the alphabet, from 0 to 1: about a half at the start."""
    return [sum("a" <= letter < "n" for letter in text) / max(len(text), 1) for text in completions]


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer, make_model):
    """``make_trainer(**settings)``: a small trainer; arguments of PPOTrainer are recognised, the rest are settings."""
    numbers = iter(range(1000))

    def make(
        model: Any = None,
        reward_funcs: Any = early_letters,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = tokenizer,
        ref_model: Any = None,
        value_model: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        respond: Any = None,
        tools: Any = (),
        environment: Any = None,
        judge_funcs: Any = (),
        **settings: Any,
    ) -> PPOTrainer:
        small = {
            "output_dir": str(tmp_path / f"run-{next(numbers)}"),
            "total_episodes": 16,
            "rollout_batch_size": 8,
            "max_new_tokens": 6,
            "stop_token_ids": (0, 12, 16, 20, 24, 28),  # a fifth of the vocabulary, so that lengths differ
            "num_epochs": 2,
            "num_minibatches": 2,
            "learning_rate": 1e-3,
            "device": "cpu",
            "precision": "fp32",  # "auto" would be bf16 on some CPUs, with its coarser rounding
            "quiet": True,
        }
        return PPOTrainer(
            model=make_model() if model is None else model,
            reward_funcs=reward_funcs,
            args=RLHFConfig(**{**small, **settings}),
            train_dataset=[{"prompt": prompt} for prompt in PROMPTS] if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            ref_model=ref_model,
            value_model=value_model,
            peft_config=peft_config,
            callbacks=callbacks,
            respond=respond,
            tools=tools,
            environment=environment,
            judge_funcs=judge_funcs,
        )

    return make


@pytest.fixture
def prompts() -> list[str]:
    """Eight prompts of different lengths."""
    return list(PROMPTS)


@pytest.fixture
def wake_critic():
    """Give a value head, which starts at 0, weights that make its values differ, in the reward's units."""

    def wake(model: ActorCritic) -> None:
        assert model.value_head is not None
        with torch.no_grad():
            model.value_head.weight.copy_(torch.linspace(-1, 1, model.value_head.weight.numel())[None])
            model.value_head.bias.fill_(0.3)
        model.value_scale = ValueScale()

    return wake


@pytest.fixture
def script(monkeypatch):
    """Replace the draws by written tokens, one row a response: one list for every call of the sampler, or one each."""

    def use(*calls: list[list[int]]) -> None:
        remaining = itertools.repeat(calls[0]) if len(calls) == 1 else iter(calls)
        # Rows leave the batch when they end; each keeps its own draws.
        monkeypatch.setattr(sampling, "uniforms", lambda *_: torch.tensor(next(remaining)).T)
        monkeypatch.setattr(sampling, "draw", lambda weights, u: u)

    return use


@pytest.fixture
def in_child():
    """``in_child(work)``: run it in a forked process; returns the exit code, negative for the signal that ended it."""

    def run(work: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of libraries, idle here, do not fork
            pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run


@pytest.fixture
def real_data() -> Path:
    """The folder of real models and data sets, or a skip."""
    folder = Path(os.environ.get("RLHF_PPO_DATA") or Path(__file__).parents[2] / "../shared/data").resolve()
    if not folder.is_dir():
        pytest.skip("real models are not here; set RLHF_PPO_DATA to their folder")
    return folder
