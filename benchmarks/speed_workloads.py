"""Workloads of the speed comparison: the same models, prompts and settings for this project and TRL."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Workload:
    """PPO iterations, by default of 32 prompts of 16 tokens, 4 epochs of 4 minibatches; random weights."""

    layers: int
    width: int
    vocabulary: int
    iterations: int
    """Iterations that are timed."""
    warmup: int = 1
    """Iterations before them that are not."""
    new_tokens: int = 48
    spread: bool = False
    """Responses end after 4 to ``new_tokens`` tokens, spread evenly, instead of all at the limit."""
    prompts: int = 32
    prompt_tokens: int = 16
    epochs: int = 4
    minibatches: int = 4
    longest_prompt: int | None = None
    """Prompts have ``prompt_tokens`` to this many tokens, spread evenly; None: all the same."""
    mean_tokens: int | None = None
    """Every token ends a response with probability 1 / this."""
    llama: tuple[int, int, int] | None = None
    """A Llama instead of a GPT-2: (heads, key-value heads, columns of the gated layer)."""
    lora_rank: int | None = None
    """Train an adapter of this rank on all linear layers; None: all weights."""
    peer_batches: int = 1
    """TRL's device batches a rollout. With several it needs less memory and takes fewer optimizer steps."""

    @property
    def heads(self) -> int:
        """Return the number of attention heads, 64 columns each."""
        return max(self.width // 64, 2)


REALISTIC = Workload(
    layers=30,
    width=576,
    vocabulary=49152,
    iterations=1,
    warmup=0,
    new_tokens=256,
    prompts=16,
    prompt_tokens=64,
    epochs=2,
    minibatches=2,
    longest_prompt=256,
    mean_tokens=128,
    llama=(9, 3, 1536),
    lora_rank=16,
    peer_batches=4,  # with one, TRL needs more than 24 GB
)
"""The shape of SmolLM2-135M, with an adapter, prompts of 64 to 256 tokens and up to 256 new ones."""

SMALL = {"layers": 2, "width": 16, "vocabulary": 64, "new_tokens": 6, "prompts": 4, "prompt_tokens": 4}
"""Of workloads that only check the code."""

WORKLOADS = {
    "S": Workload(layers=4, width=128, vocabulary=4096, iterations=8),
    "M": Workload(layers=6, width=384, vocabulary=50257, iterations=3),
    "L": Workload(layers=12, width=768, vocabulary=50257, iterations=1, warmup=0),
    "V": Workload(layers=6, width=384, vocabulary=50257, iterations=2, new_tokens=128, spread=True),
    # For one GPU (gpu_kit.py): GPT-2 124M.
    "G": Workload(12, 768, 50257, iterations=2, warmup=2, new_tokens=128, prompts=64, prompt_tokens=64),
    "R": REALISTIC,
    "tiny": Workload(iterations=1, **SMALL),
    "tiny-R": replace(REALISTIC, **SMALL, longest_prompt=8, mean_tokens=4, llama=(2, 1, 32), lora_rank=2),
}

EOS, PAD = 0, 1
SHORTEST = 4


def config(work: Workload) -> PretrainedConfig:
    """Return the config of policy, critic, reward model and reference."""
    if work.llama is not None:
        heads, key_value_heads, gated = work.llama
        return LlamaConfig(
            vocab_size=work.vocabulary,
            hidden_size=work.width,
            intermediate_size=gated,
            num_hidden_layers=work.layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=EOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            num_labels=1,
        )
    return GPT2Config(
        vocab_size=work.vocabulary,
        n_positions=256,
        n_embd=work.width,
        n_layer=work.layers,
        n_head=work.heads,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )


class SpreadLengths(GPT2LMHeadModel):
    """A policy whose end-of-text logit depends on the position, so that lengths spread evenly up to the limit.

    With n tokens to go, end of text has probability 1/n: every length from 4 to the limit is equally likely.
    """

    def __init__(self, config: GPT2Config, first: int = 16, limit: int = 128) -> None:
        super().__init__(config)
        # The token at response step t (from 0) is predicted at position first - 1 + t.
        steps = torch.arange(config.n_positions) - (first - 1)
        left = (limit - steps).clamp(min=1)
        ends = (1.0 / left).clamp(max=1 - 1e-6)
        # Random weights give all V tokens about the same logit, so the odds of one against the rest are about 1/V.
        bias = torch.log(ends / (1 - ends)) + torch.log(torch.tensor(float(config.vocab_size)))
        bias[steps < SHORTEST - 1] = -20.0
        self.register_buffer("eos_bias", bias, persistent=False)

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        keep = output.logits.shape[1]
        kept = kwargs.get("logits_to_keep", 0)
        positions = position_ids[:, kept] if isinstance(kept, torch.Tensor) else position_ids[:, -keep:]
        output.logits[..., 0] += self.eos_bias[positions]
        return output


class RandomLengths(LlamaForCausalLM):
    """A policy that ends a response at each token with about the same probability."""

    mean_tokens = 128

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        # Random weights give all tokens about the same logit, so the odds of one against the rest are about 1/V.
        output.logits[..., EOS] += torch.log(torch.tensor(self.config.vocab_size / (self.mean_tokens - 1)))
        return output


def make_models(work: Workload) -> dict[str, torch.nn.Module]:
    """Build policy, equal reference, value and reward (classifiers), always from the same seeds."""
    classifier = GPT2ForSequenceClassification if work.llama is None else LlamaForSequenceClassification

    def policy() -> torch.nn.Module:
        torch.manual_seed(0)
        if work.spread:
            return SpreadLengths(config(work), first=work.prompt_tokens, limit=work.new_tokens)
        if work.mean_tokens is not None:
            model = RandomLengths(config(work))
            model.mean_tokens = work.mean_tokens
            return model
        return GPT2LMHeadModel(config(work))

    def scalar(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return classifier(config(work))

    return {"policy": policy(), "reference": policy(), "value": scalar(1), "reward": scalar(2)}


def make_tokenizer(work: Workload) -> PreTrainedTokenizerFast:
    """Build a tokenizer that writes token i as "<i>", so that ids survive decoding and encoding.

    No token's text is a prefix of another's, because special tokens are found inside words too.
    """
    core = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(work.vocabulary)}, unk_token="<2>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=f"<{EOS}>", pad_token=f"<{PAD}>")


def prompt_lengths(work: Workload) -> list[int]:
    """Return the number of tokens of each prompt."""
    longest = work.longest_prompt or work.prompt_tokens
    return torch.linspace(work.prompt_tokens, longest, work.prompts).round().long().tolist()


def make_prompts(work: Workload) -> list[str]:
    """Sample random prompts, without end of text and padding."""
    generator = torch.Generator().manual_seed(3)
    lengths = prompt_lengths(work)
    ids = torch.randint(2, work.vocabulary, (work.prompts, max(lengths)), generator=generator)
    return ["".join(f"<{i}>" for i in row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]
