"""Workloads of the speed comparison: the same models, prompts and settings for this project and TRL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Workload:
    """PPO iterations, by default of 32 prompts of 16 tokens, 4 epochs of 4 minibatches; GPT-2 with random weights."""

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

    @property
    def heads(self) -> int:
        """Return the number of attention heads, 64 columns each."""
        return max(self.width // 64, 2)


WORKLOADS = {
    "S": Workload(layers=4, width=128, vocabulary=4096, iterations=8),
    "M": Workload(layers=6, width=384, vocabulary=50257, iterations=3),
    "L": Workload(layers=12, width=768, vocabulary=50257, iterations=1, warmup=0),
    "V": Workload(layers=6, width=384, vocabulary=50257, iterations=2, new_tokens=128, spread=True),
    # For one GPU (gpu_kit.py): GPT-2 124M, and one that only checks the code.
    "G": Workload(12, 768, 50257, iterations=2, warmup=2, new_tokens=128, prompts=64, prompt_tokens=64),
    "tiny": Workload(layers=2, width=16, vocabulary=64, iterations=1, new_tokens=6, prompts=4, prompt_tokens=4),
}

EOS, PAD = 0, 1
SHORTEST = 4


def config(work: Workload) -> GPT2Config:
    """Return the config of policy, critic, reward model and reference."""
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


def make_models(work: Workload) -> dict[str, torch.nn.Module]:
    """Build policy, equal reference, value and reward (classifiers), always from the same seeds."""

    def make(kind, seed):
        torch.manual_seed(seed)
        if kind is GPT2LMHeadModel and work.spread:
            return SpreadLengths(config(work), first=work.prompt_tokens, limit=work.new_tokens)
        return kind(config(work))

    return {
        "policy": make(GPT2LMHeadModel, 0),
        "reference": make(GPT2LMHeadModel, 0),
        "value": make(GPT2ForSequenceClassification, 1),
        "reward": make(GPT2ForSequenceClassification, 2),
    }


def make_tokenizer(work: Workload) -> PreTrainedTokenizerFast:
    """Build a tokenizer that writes token i as "<i>", so that ids survive decoding and encoding.

    No token's text is a prefix of another's, because special tokens are found inside words too.
    """
    core = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(work.vocabulary)}, unk_token="<2>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=f"<{EOS}>", pad_token=f"<{PAD}>")


def make_prompts(work: Workload) -> list[str]:
    """Sample random prompts of equal length, without end of text and padding."""
    generator = torch.Generator().manual_seed(3)
    size = (work.prompts, work.prompt_tokens)
    ids = torch.randint(2, work.vocabulary, size, generator=generator)
    return ["".join(f"<{i}>" for i in row) for row in ids.tolist()]
