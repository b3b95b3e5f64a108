"""Count and time what decoding saves: ``python benchmarks/decoding.py``.

What you will see, after about a minute on one CPU core: rows of decode steps for 256 responses of 4 to 128 tokens, with
and without slots (a count: the same on every machine), and how much faster eight responses to one prompt start.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from speed_workloads import EOS, WORKLOADS, SpreadLengths, config
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation import decoding
from rlhf_ppo.generation.engines import StaticEngine, sample_with_refill
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.slots import Pace
from rlhf_ppo.models.actor_critic import ActorCritic

RESPONSES = 256
SPREAD = replace(WORKLOADS["V"], layers=1, width=64, vocabulary=512)
"""V's lengths, from a model that is small, because only they count."""


def count_rows(sample: Callable[..., SampledResponses]) -> dict[str, int]:
    """Count the rows of all decode steps after the prompts', and the tokens that they were needed for."""
    torch.manual_seed(0)
    model = ActorCritic(SpreadLengths(config(SPREAD), first=SPREAD.prompt_tokens, limit=SPREAD.new_tokens))
    rows, decode = [0], model.decode

    def counting(ids: torch.Tensor, *rest: Any) -> Any:
        rows[0] += len(ids) if ids.shape[1] == 1 else 0
        return decode(ids, *rest)

    model.decode = counting  # pyright: ignore[reportAttributeAccessIssue]
    prompts = torch.randint(2, SPREAD.vocabulary, (RESPONSES, SPREAD.prompt_tokens))
    params = SamplingParams(max_new_tokens=SPREAD.new_tokens, stop_token_ids=(EOS,))
    generator = torch.Generator().manual_seed(1)
    sampled = sample(model, prompts, torch.ones_like(prompts, dtype=torch.bool), params, generator=generator)
    return {"rows": rows[0], "needed": int(sampled.mask.sum()) - RESPONSES}


def prompt_phase(model: Any, prompt_tokens: int = 256, copies: int = 8, prompts: int = 4) -> dict[str, float]:
    """Time the first token of ``copies`` responses to each prompt, with equal prompts read once and each by itself."""
    actor = ActorCritic(model)
    rows = torch.randint(2, 500, (prompts, prompt_tokens)).tolist()
    batch = left_pad([row for row in rows for _ in range(copies)], torch.device("cpu"))
    found: dict[str, list[float]] = {"each": [], "shared": []}
    for _ in range(6):
        for name, times in found.items():
            actor.runner.cache_shrinks = name == "shared"
            started = time.perf_counter()
            decoding.sample_responses(actor, *batch, SamplingParams(max_new_tokens=1))
            times.append(time.perf_counter() - started)
    each, shared = (sorted(times[1:])[2] for times in found.values())
    return {"each_s": each, "shared_s": shared, "ratio": each / shared}


def main() -> int:
    """Measure and print JSON lines."""
    torch.set_num_threads(1)
    on_gpu = Pace(8, waits=False)
    engines = {
        "static, all 256 at once": StaticEngine(compile_step=False, pace=on_gpu),
        "static, chunks of 64": None,
        "static, 64 slots": StaticEngine(compile_step=False, slots=64, pace=on_gpu),
        "dynamic, all 256 at once": decoding.sample_responses,
        "dynamic, 64 slots": partial(sample_with_refill, slots=64),
    }
    for name, engine in engines.items():
        print(json.dumps({"decoding": name, **count_rows(engine or in_chunks)}), flush=True)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
    for name, shape in {
        "GPT-2": GPT2Config(vocab_size=512, n_embd=128, n_layer=4, n_head=4),
        "Llama": LlamaConfig(vocab_size=512, **sizes),
    }.items():
        print(json.dumps({"prompts": name, **prompt_phase(AutoModelForCausalLM.from_config(shape))}), flush=True)
    return 0


def in_chunks(
    model: ActorCritic, ids: torch.Tensor, mask: torch.Tensor, params: SamplingParams, generator: torch.Generator
) -> SampledResponses:
    """Decode 64 responses with fixed shapes, then the next 64, each chunk until its longest response has ended."""
    engine = StaticEngine(compile_step=False, pace=Pace(8, waits=False))
    parts = [
        engine(model, *part, params, generator=generator) for part in zip(ids.split(64), mask.split(64), strict=True)
    ]
    longest = max(part.mask.shape[1] for part in parts)
    masks = [torch.nn.functional.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    return parts[0]._replace(mask=torch.cat(masks))


if __name__ == "__main__":
    sys.exit(main())
