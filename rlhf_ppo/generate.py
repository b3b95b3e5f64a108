"""Generating text with a trained model, by the sampler it was trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_ppo.actor_critic import ActorCritic
from rlhf_ppo.data import decode_responses, encode_prompts
from rlhf_ppo.models import load_config, load_policy, load_tokenizer, prompt_room, resolve_model
from rlhf_ppo.rollout import sample_responses
from rlhf_ppo.runtime.seeding import resolve_device
from rlhf_ppo.setup import stop_tokens


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Sample completions of prompts from a model."""

    model: str
    """Folder or hub id, or "embedded"."""
    prompt: tuple[str, ...]
    """One or more prompts."""
    num_samples: int = 1
    """Completions per prompt."""
    max_new_tokens: int = 48
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Divides the logits; below 1 is safer, above 1 wilder."""
    seed: int = 0
    """Seed of the draws."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is there."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def generate(args: GenerateArgs) -> list[tuple[str, str]]:
    """(prompt, completion) pairs, ``num_samples`` per prompt."""
    device = resolve_device(args.device)
    name = resolve_model(args.model)
    config, tokenizer = load_config(name), load_tokenizer(name)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_samples)]
    room = prompt_room(config, args.max_new_tokens)
    prompt_ids, prompt_mask = encode_prompts(prompts, tokenizer, room=room, truncate=False, device=device)
    sampled = sample_responses(
        ActorCritic(load_policy(name), critic=False).to(device),
        prompt_ids,
        prompt_mask,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stop_token_ids=stop_tokens(name, config, tokenizer),
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    return list(zip(prompts, decode_responses(tokenizer, sampled.response_ids, sampled.mask), strict=True))
