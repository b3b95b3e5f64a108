"""Stop tokens: which tokens end a response."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.loading import adapter_base, resolve_model


def choose_stop_tokens(
    model: str | PreTrainedModel,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    args: RLHFConfig,
    vocab_size: int,
) -> tuple[int, ...]:
    """Return the tokens that end a response: those of the settings, else those that the model names.

    Raises:
        ValueError: one is not in the vocabulary, or there is none and a setting needs one.
    """
    stops = stop_tokens(model, config, tokenizer) if args.stop_token_ids is None else args.stop_token_ids
    if not all(0 <= i < vocab_size for i in stops):
        raise ValueError(f"stop tokens {stops} must lie in the vocabulary [0, {vocab_size}): set stop_token_ids")
    if not stops and args.min_new_tokens:
        raise ValueError(
            f"min_new_tokens={args.min_new_tokens} bans stop tokens, but model and tokenizer name none: set "
            "stop_token_ids, or min_new_tokens to 0"
        )
    if not stops and not args.stop_strings and args.missing_eos_penalty is not None:
        raise ValueError(
            f"missing_eos_penalty={args.missing_eos_penalty} needs a stop token, but model and tokenizer name none: "
            "set stop_token_ids"
        )
    if args.stop_token_ids is None:
        warn_of_unread_end(stops, tokenizer)
    return stops


def stop_tokens(
    model: str | PreTrainedModel, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return end-of-text ids from the model's generation config, else its config, else the tokenizer, else ()."""
    named: tuple[Any, ...] = (
        _generation_eos(model),
        config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    )
    found: Any = next((eos for eos in named if eos is not None), ())
    return (found,) if isinstance(found, int) else tuple(found)


def end_tokens(
    model: str | PreTrainedModel, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return every id that generation config, config or tokenizer call the end of text."""
    named: tuple[Any, ...] = (
        _generation_eos(model),
        config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    )
    return frozenset(i for eos in named if eos is not None for i in ([eos] if isinstance(eos, int) else eos))


def _generation_eos(model: str | PreTrainedModel) -> int | list[int] | None:
    if not isinstance(model, str):
        return None if model.generation_config is None else model.generation_config.eos_token_id
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # not every model has a generation config
        base = adapter_base(model)
        return None if base is None else _generation_eos(resolve_model(base))


def warn_of_unread_end(stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if the tokenizer's end-of-text token does not end a response."""
    end = tokenizer.eos_token_id
    if stops and end is not None and end not in stops:
        names = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in stops)
        warnings.warn(
            f"responses stop at {names}, as the model's generation config says, but the tokenizer's end of text is "
            f"{end} ({tokenizer.eos_token!r}): a model that was trained to end with it never stops. Set "
            "stop_token_ids, or eos_token_id in generation_config.json",
            stacklevel=3,
        )
