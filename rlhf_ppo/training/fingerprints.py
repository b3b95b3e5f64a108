"""Fingerprints: which data and which reference a run has, so that a resumed run cannot silently have others."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.models.lora import earlier_name
from rlhf_ppo.training.setup import RunParts

_VALUES_PER_TENSOR = 2**16


def run_fingerprints(parts: RunParts) -> dict[str, Any]:
    """Digests of the data sets and of the reference, the adapter's configuration, and what else no setting says."""
    reference = parts.reference.model or parts.model.policy
    adapters: Any = getattr(parts.model.policy, "peft_config", {})
    return {
        "train_dataset": None if parts.train_prompts is None else data_fingerprint(parts.train_prompts),
        "eval_dataset": None if parts.eval_prompts is None else data_fingerprint(parts.eval_prompts),
        "reference": weights_fingerprint(reference),
        "reward_funcs": list(parts.rewards),
        "stop_token_ids": list(parts.stop_token_ids),
        "adapters": {earlier_name(name): _adapter(config) for name, config in adapters.items()},
        "device": parts.device.type,
        "bf16": parts.bf16,
        "processes": 1,
    }


def data_fingerprint(prompts: PromptSet) -> str:
    """Digest of all rows with all columns, in order; an object that JSON does not know counts by its type alone."""
    digest = hashlib.sha256()
    for start in range(0, len(prompts), 1000):
        batch = prompts.take(range(start, min(start + 1000, len(prompts))))
        rows = _with_text_keys({"prompt": batch.prompts, **batch.columns})
        digest.update(json.dumps(rows, sort_keys=True, default=_plain).encode())
    return f"{len(prompts)} rows, {digest.hexdigest()[:16]}"


def _with_text_keys(value: Any) -> Any:
    """JSON sorts keys, which those of several kinds refuse."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def weights_fingerprint(model: nn.Module) -> str:
    """Digest of the frozen parameters: name, shape, type, and up to 65,536 values of each, evenly spread.

    All values of a small model; of a large one enough to tell it from another, without reading it from end to end.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        digest.update(f"{earlier_name(name)} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach().flatten()
        spread = values[:: max(1, len(values) // _VALUES_PER_TENSOR)].contiguous().cpu()
        digest.update(spread.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _adapter(config: Any) -> dict[str, Any]:
    # Sets have no order of their own, and where the base lay is no property of the adapter.
    facts = {key: sorted(x) if isinstance(x, set) else x for key, x in config.to_dict().items()}
    return {key: x for key, x in facts.items() if key not in ("base_model_name_or_path", "revision", "inference_mode")}
