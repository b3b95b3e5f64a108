"""Connect to the vLLM server before models are loaded, and check afterwards that it samples from the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import masked_mean
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.tokenization import encode_bare
from rlhf_ppo.generation.stop_tokens import end_tokens
from rlhf_ppo.generation.vllm.engine import VLLMEngine
from rlhf_ppo.generation.vllm.server import Served, VLLMError, VLLMServer
from rlhf_ppo.generation.vllm.start_line import start_line
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.compare import source_name
from rlhf_ppo.models.loading import adapter_base, vocabulary_size
from rlhf_ppo.models.sharded.sharding import gathered
from rlhf_ppo.runtime.logs.run_directory import SERVED_FOLDER
from rlhf_ppo.training.outside.publish import publish, withdraw
from rlhf_ppo.training.run import Run

_PROBE = "The 12 ducks said:\n\t'na\u00efve?' {x=3} \u4f60\u597d <b>"
"""Text that tokenizers divide differently."""


def connect(
    args: RLHFConfig,
    model: Any,
    peft_config: Any,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptSet],
    stop_token_ids: Sequence[int],
    *,
    bf16: bool,
) -> VLLMEngine | None:
    """Return the engine of generation=vllm, once its server has been asked what it is; None under other engines.

    Raises:
        ValueError: there is no server, it has another tokenizer or too short a context, or no server can sample so;
            says what to do, with the line that starts a server.
    """
    if args.generation != "vllm":
        return None
    line = start_line(**_needs(model, peft_config), bf16=bf16)
    if args.vllm_url is None:
        raise ValueError(
            f"generation='vllm' needs vllm_url, the address of a vLLM server with {source_name(model)}. This line "
            f"starts one at http://127.0.0.1:8000:\n{line}"
        )
    _require_own_stops(args, model, config, tokenizer, stop_token_ids)
    server = VLLMServer(args.vllm_url, timeout_s=args.vllm_timeout_s, max_retries=args.vllm_retries)
    try:
        served = server.served()
        _require_same_tokenizer(server, served, tokenizer)
    except VLLMError as error:
        raise ValueError(f"{error}. Nothing was generated. This line starts a server:\n{line}") from None
    longest = max((some.longest + args.max_new_tokens for some in prompts), default=0)
    if served.max_model_len is not None and longest > served.max_model_len:
        raise ValueError(
            f"vLLM server {server.name} reads at most {served.max_model_len} tokens, but the longest prompt and "
            f"max_new_tokens={args.max_new_tokens} make {longest}: start it with --max-model-len {longest} or more"
        )
    folder = Path(args.output_dir) / SERVED_FOLDER
    return VLLMEngine(server, served, folder, vocabulary=vocabulary_size(config), at_once=args.decode_batch_size)


def _needs(model: Any, peft_config: Any) -> dict[str, Any]:
    """Return which model a server must load, and the rank of the adapters that it must take; refuse other adapters."""
    named: str | None = model if isinstance(model, str) else model.name_or_path or None
    if isinstance(model, str) and (base := adapter_base(model)) is not None:
        from peft import PeftConfig

        peft_config, named = PeftConfig.from_pretrained(model), base
    elif peft_config is None and not isinstance(model, str) and hasattr(model, "peft_config"):
        peft_config = model.peft_config[model.active_adapter]
    if peft_config is not None and getattr(peft_config.peft_type, "value", peft_config.peft_type) != "LORA":
        raise ValueError(
            f"generation='vllm' takes LoRA adapters, and peft_config is {type(peft_config).__name__}: use a "
            "LoraConfig, or another generation"
        )
    return {"model": named, "lora_rank": None if peft_config is None else peft_config.r}


def _require_own_stops(
    args: RLHFConfig,
    model: Any,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
) -> None:
    """Refuse a minimum length where the server would ban other tokens, its own ends, than the run does."""
    if args.min_new_tokens and (others := end_tokens(model, config, tokenizer) - set(stop_token_ids)):
        raise ValueError(
            f"min_new_tokens={args.min_new_tokens} bans the stop tokens {tuple(stop_token_ids)}, but a vLLM server "
            f"bans the model's own ends {tuple(sorted(others))}, too: add them to stop_token_ids, or set "
            "min_new_tokens to 0"
        )


def _require_same_tokenizer(server: VLLMServer, served: Served, tokenizer: PreTrainedTokenizerBase) -> None:
    theirs, ours = server.tokenize(_PROBE), encode_bare(tokenizer, _PROBE)
    if theirs != ours:
        raise VLLMError(
            f"vLLM server {server.name} serves {served.name} with another tokenizer than the run's: it makes "
            f"{theirs!r:.80} of a text that is {ours!r:.80} here. Give both the same model"
        )


def require_agreement(run: Run, model: ActorCritic) -> None:
    """Check, before the first rollout, that the server gives the policy's log-probs to what it samples from it.

    Raises:
        ValueError: it does not, or fails; says what may be the cause.
    """
    if run.engine is None:
        return
    if run.args.rollouts_ahead and run.respond is not None:
        raise ValueError(
            f"rollouts_ahead={run.args.rollouts_ahead} would call respond or environments during the update, while "
            "those of the rollout before are still open: set rollouts_ahead to 0"
        )
    if hasattr(model.policy, "peft_config") and run.base is None:
        raise ValueError(
            "generation='vllm' loads the policy's adapter on the server's own model, but no folder or hub id holds the "
            "model under this adapter (a changed model object, PiSSA and its like): save it in a folder first, "
            "and start from there"
        )
    try:
        _require_same_policy(run, run.engine, model)
    except BaseException:
        withdraw(run)
        raise


def _require_same_policy(run: Run, engine: VLLMEngine, model: ActorCritic) -> None:
    ids = model.runner.probe_ids().repeat(4, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    free = dataclasses.replace(run.sampling, max_new_tokens=8, min_new_tokens=0, stop_token_ids=(), stop_strings=())
    try:
        publish(run, model)
        sampled = engine(model, ids, mask, free, generator=torch.Generator(run.device).manual_seed(0))
    except VLLMError as error:
        raise ValueError(f"{error}. Nothing was generated") from None
    with torch.no_grad(), gathered(model), computing(model, bf16=run.bf16):
        ours = model(ids, mask, sampled.response_ids, sampled.mask, temperature=free.temperature, entropy=False)
    gap, bound = float(masked_mean((ours.logprobs - sampled.logprobs).abs(), sampled.mask)), run.args.sampler_gap_bound
    if not gap <= bound:
        raise ValueError(
            f"vLLM server {engine.server.name} does not sample from {run.sources['model']}: its log-probs are "
            f"{gap:.3g} nats per token from ours, above max_sampler_gap={bound}. Usual causes: it serves another "
            "model, in another --dtype, or (where temperature is not 1) without --logprobs-mode processed_logprobs"
        )
